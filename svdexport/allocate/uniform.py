"""The same kept ratio everywhere, rounded to the runtime's multiple."""

from __future__ import annotations

from collections.abc import Sequence

from svdexport.allocate.base import (
    BREAK_EVEN,
    TOO_LITTLE_TO_SAVE,
    Allocation,
    Candidate,
)
from svdexport.core.lowrank import round_rank
from svdexport.recipe.settings import NO_SETTINGS, Settings


def allocate(
    candidates: Sequence[Candidate],
    param_ratio: float,
    multiple: int,
    settings: Settings = NO_SETTINGS,
) -> dict[str, Allocation]:
    """Rank k with k (m + n) nearest to ``param_ratio`` m n, for each group by itself."""
    chosen: dict[str, Allocation] = {}
    for item in candidates:
        wanted = param_ratio * item.dense_params / item.rank_params
        rank = round_rank(wanted, multiple)
        ranks = item.ranks(multiple)
        if not ranks:
            chosen[item.name] = Allocation(None, BREAK_EVEN)
        elif rank > ranks[-1]:
            chosen[item.name] = Allocation(None, TOO_LITTLE_TO_SAVE)
        else:
            chosen[item.name] = Allocation(rank)
    return chosen
