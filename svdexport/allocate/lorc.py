"""LoRC's progressive ranks: the earlier the block, the more its errors grow on the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from svdexport.allocate.base import Allocation, Candidate, by_ratios
from svdexport.recipe.settings import LorcDepth, Settings


def allocate(
    candidates: Sequence[Candidate], param_ratio: float, multiple: int, settings: Settings
) -> dict[str, Allocation]:
    """Kept share of block l: 1 - (1 - min_ratio) (max - c_l) / (max - min), scaled to the budget.

    c_l is the logarithm of the cumulative condition number: the product, over this block and all
    later ones, of the largest over the smallest singular value of its matrices. ``energies`` are
    the squared singular values: the ratios are the paper's where the method is lorc or svd. The
    first ``protect`` blocks stay dense.
    """
    assert isinstance(settings, LorcDepth)
    own: dict[int, float] = {}
    for item in candidates:
        own[item.block] = own.get(item.block, 0.0) + _log_condition(item)
    total, cumulative = 0.0, dict[int, float]()
    for block in sorted(own, reverse=True):
        total += own[block]
        cumulative[block] = total
    high, low = max(cumulative.values()), min(cumulative.values())
    span = (high - low) or 1.0
    shares: dict[str, float] = {}
    for item in candidates:
        depth = (high - cumulative[item.block]) / span
        shares[item.name] = 1.0 - (1.0 - settings.min_ratio) * depth
        if item.block < settings.protect:
            shares[item.name] = math.inf
    return by_ratios(candidates, shares, param_ratio, multiple)


def _log_condition(item: Candidate) -> float:
    if item.energies is None:
        raise ValueError(f"{item.name}: this allocation needs the group's energies")
    largest, smallest = float(item.energies[0]), float(item.energies[-1])
    if largest <= 0.0:
        return 0.0
    return 0.5 * math.log(largest / max(smallest, 1e-12 * largest))
