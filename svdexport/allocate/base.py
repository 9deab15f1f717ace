"""What an allocation strategy takes and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from svdexport.core.lowrank import pair_params, round_rank
from svdexport.core.moments import Statistic
from svdexport.core.remap import slots_per_rank
from svdexport.errors import RecipeError
from svdexport.recipe.settings import Settings


@dataclass(frozen=True)
class Candidate:
    """A group of linears that may become a pair with one shared A.

    Attributes:
        name: the leader's name.
        out_features: outputs of all members together. in_features: of their input.
        energies: squared singular values in the method's metric, descending (for ``greedy``:
            in units comparable across groups), or None where they were not computed.
        kind: type of the matrix, the same in every block. block: number of its block.
        count: pairs that this stands for and that get one rank: those of a layer's experts.
            ``energies`` are then summed over them.
        similarity: mean cosine of its block's input and output, where it was asked for.
        trials: (kept share, perplexity with this group alone truncated), and position: a learned
            rank; for the strategies that measure them.
        remapped: ranks are stored as Dobi-SVD remaps them, in max(m, n) parameters each.
    """

    name: str
    out_features: int
    in_features: int
    energies: np.ndarray | None = None
    kind: str = ""
    block: int = 0
    similarity: float | None = None
    trials: tuple[tuple[float, float], ...] | None = None
    position: float | None = None
    count: int = 1
    remapped: bool = False

    @property
    def dense_params(self) -> int:
        return self.count * self.out_features * self.in_features

    @property
    def rank_params(self) -> int:
        """Parameters of one rank; remapped, slots of 16 bits."""
        shape = self.out_features, self.in_features
        return self.count * (slots_per_rank(*shape) if self.remapped else pair_params(1, *shape))

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank; None is dense."""
        if rank is None:
            return self.dense_params
        return rank * self.rank_params

    def ranks(self, multiple: int) -> list[int]:
        """The ranks a runtime takes that still save parameters, ascending; may be empty."""
        limit = (self.dense_params - 1) // self.rank_params
        return list(range(multiple, limit + 1, multiple))


@dataclass(frozen=True)
class Allocation:
    """Rank of a group; None is dense and then ``reason`` says why."""

    rank: int | None
    reason: str = ""


BREAK_EVEN = "no rank that the runtime takes is below break-even"
TOO_LITTLE_TO_SAVE = "the rank for this budget is past break-even"
PROTECTED = "the allocation keeps this block dense"
DENSE_PAYS = "dense pays: the predicted loss per parameter is best spent here"


@dataclass(frozen=True)
class Strategy:
    """How a budget is shared out: ``allocate(candidates, param_ratio, multiple, settings)``.

    ``needs`` is what calibration must collect for it, beyond what the method asks for;
    ``measure`` what must be measured on the model once the factors are there.
    """

    title: str
    allocate: Callable[[Sequence[Candidate], float, int, Settings], dict[str, Allocation]]
    needs: frozenset[Statistic] = frozenset()
    measure: Literal["sensitivity", "positions"] | None = None


def by_ratios(
    candidates: Sequence[Candidate], kept: Mapping[str, float], param_ratio: float, multiple: int
) -> dict[str, Allocation]:
    """Ranks for a wanted kept share of each group, all scaled by one factor to fit the budget.

    The factor is the largest (found by bisection) at which the parameters stay within
    ``param_ratio`` of the dense ones: rounding to the multiple, and shares past break-even, which
    become dense, would otherwise miss the budget. An infinite share is dense at any factor.

    Raises:
        RecipeError: even the smallest ranks exceed the budget.
    """
    budget = param_ratio * sum(item.dense_params for item in candidates)

    def choose(scale: float) -> tuple[dict[str, Allocation], int]:
        chosen = {
            c.name: _at_share(
                c, scale * kept[c.name] if math.isfinite(kept[c.name]) else math.inf, multiple
            )
            for c in candidates
        }
        return chosen, sum(item.cost(chosen[item.name].rank) for item in candidates)

    low, high = 0.0, 1.0 / max(min(kept.values()), 1e-6)
    best, cost = choose(low)
    if cost > budget:
        raise RecipeError(
            f"compress.budget: param_ratio {param_ratio} is too small for ranks of at least "
            f"{multiple} and what the allocation keeps dense"
        )
    for _ in range(60):
        middle = (low + high) / 2
        chosen, cost = choose(middle)
        if cost <= budget:
            low, best = middle, chosen
        else:
            high = middle
    return best


def _at_share(item: Candidate, share: float, multiple: int) -> Allocation:
    ranks = item.ranks(multiple)
    if not ranks:
        return Allocation(None, BREAK_EVEN)
    if math.isinf(share):
        return Allocation(None, PROTECTED)
    rank = round_rank(share * item.dense_params / item.rank_params, multiple)
    return Allocation(rank) if rank <= ranks[-1] else Allocation(None, TOO_LITTLE_TO_SAVE)
