"""Dobi-SVD's ranks: positions that were learned with the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence

from svdexport.allocate.base import Allocation, Candidate, by_ratios
from svdexport.recipe.settings import Settings


def allocate(
    candidates: Sequence[Candidate], param_ratio: float, multiple: int, settings: Settings
) -> dict[str, Allocation]:
    """The learned positions, rounded to the multiple and scaled to the budget."""
    shares: dict[str, float] = {}
    for item in candidates:
        if item.position is None:
            raise ValueError(f"{item.name}: this allocation needs a learned position")
        shares[item.name] = item.position * item.rank_params / item.dense_params
    return by_ratios(candidates, shares, param_ratio, multiple)
