"""ASVD's ranks: the same bound on every group's own damage."""

from __future__ import annotations

from collections.abc import Sequence

from svdexport.allocate.base import Allocation, Candidate, by_ratios
from svdexport.recipe.settings import Settings


def allocate(
    candidates: Sequence[Candidate], param_ratio: float, multiple: int, settings: Settings
) -> dict[str, Allocation]:
    """Kept share of a group: the least tried one whose perplexity alone is within a bound.

    The bound is the lowest that meets the budget (the paper finds it by bisection over the sorted
    perplexities); what is left of the budget is shared out in proportion.
    """
    bounds = sorted({perplexity for item in candidates for _, perplexity in _trials(item)})
    budget = param_ratio * sum(item.dense_params for item in candidates)
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if _cost(candidates, bounds[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    shares = {item.name: _share(item, bounds[low]) for item in candidates}
    return by_ratios(candidates, shares, param_ratio, multiple)


def _trials(item: Candidate) -> tuple[tuple[float, float], ...]:
    if item.trials is None:
        raise ValueError(f"{item.name}: this allocation needs the group's sensitivity")
    return item.trials


def _share(item: Candidate, bound: float) -> float:
    return min((share for share, value in _trials(item) if value <= bound), default=1.0)


def _cost(candidates: Sequence[Candidate], bound: float) -> float:
    return sum(_share(item, bound) * item.dense_params for item in candidates)
