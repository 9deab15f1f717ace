"""AdaSVD's adaCR: a block that changes its input little is held to matter more."""

from __future__ import annotations

from collections.abc import Sequence

from svdexport.allocate.base import Allocation, Candidate, by_ratios
from svdexport.recipe.settings import Adacr, Settings


def allocate(
    candidates: Sequence[Candidate], param_ratio: float, multiple: int, settings: Settings
) -> dict[str, Allocation]:
    """Kept share: mrr + I (param_ratio - mrr), with I the block's similarity over the mean of all.

    The similarity is the cosine of the block's input and output; matrices that are not square
    have no cosine of their own, so all linears of a block share it. ``min_ratio`` is mrr.
    """
    assert isinstance(settings, Adacr)
    similar: dict[str, float] = {}
    for item in candidates:
        if item.similarity is None:
            raise ValueError(f"{item.name}: adacr needs the similarity of its block")
        similar[item.name] = item.similarity
    mean = sum(similar.values()) / len(similar)
    least = min(settings.min_ratio, param_ratio)
    kept = {
        name: min(1.0, max(0.0, least + value / mean * (param_ratio - least)))
        for name, value in similar.items()
    }
    return by_ratios(candidates, kept, param_ratio, multiple)
