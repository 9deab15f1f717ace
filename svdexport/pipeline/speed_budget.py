"""``budget: {speedup: ...}``: the share of parameters at which a token is predicted to be so fast.

Predicted is one decode step: the products of all linears and of the head, each shape timed on this
machine dense and at two ranks. Attention, norms and sampling are left out, so a short model gains
less than predicted; a run measures what its files gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from svdexport.allocate import Allocation
from svdexport.core.lowrank import break_even_rank
from svdexport.core.product_time import ProductTime, time_products
from svdexport.errors import RecipeError
from svdexport.models.blocks import InputGroup, Structure

_STEPS = 12  # of the bisection: a share to 1 / 4096


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of a token's products: by leader of the groups, and of all that stays dense."""

    groups: Mapping[str, ProductTime]
    rest: float

    def speedup(self, chosen: Mapping[str, Allocation]) -> float:
        """Predicted against all dense."""
        now = sum(times.at(chosen[name].rank) for name, times in self.groups.items())
        return (self.rest + sum(t.dense for t in self.groups.values())) / (self.rest + now)


def measure(groups: Sequence[InputGroup], structure: Structure) -> SpeedModel:
    """Time every shape once.

    Raises:
        RecipeError: experts, of which a token meets only a few.
    """
    if any(group.stack for group in groups):
        raise RecipeError(
            "compress.budget.speedup: which experts a token meets is not known beforehand; give "
            "param_ratio"
        )
    timed: dict[tuple[int, ...], ProductTime] = {}

    def time_of(outputs: tuple[int, ...], inputs: int) -> ProductTime:
        if (*outputs, inputs) not in timed:
            high = max(1, break_even_rank(sum(outputs), inputs))
            timed[(*outputs, inputs)] = time_products(outputs, inputs, high)
        return timed[(*outputs, inputs)]

    found = {
        group.leader: time_of(
            tuple(m.out_features for m in group.members), group.members[0].in_features
        )
        for group in groups
    }
    taken = {member.name for group in groups for member in group.members}
    others = [x for x in structure.linears() if x.name not in taken]
    rest = sum(time_of((x.out_features,), x.in_features).dense for x in others)
    if structure.embedding is not None:  # the head has the table's shape
        table = structure.embedding
        rest += time_of((table.in_features,), table.out_features).dense
    return SpeedModel(found, rest)


def choose(
    model: SpeedModel, wanted: float, allocate: Callable[[float], dict[str, Allocation]]
) -> dict[str, Allocation]:
    """The allocation of the largest share of parameters that is predicted to be fast enough.

    Args:
        allocate: ranks for a share of the parameters; may raise RecipeError for one too small.

    Raises:
        RecipeError: no share gives this speedup.
    """
    low, high, best = 0.0, 1.0, None
    fastest = 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        try:
            chosen = allocate(middle)
        except RecipeError:
            low = middle
            continue
        reached = model.speedup(chosen)
        fastest = max(fastest, reached)
        if reached >= wanted:
            low, best = middle, chosen
        else:
            high = middle
    if best is None:
        raise RecipeError(
            f"compress.budget.speedup: {wanted:g} is out of reach: the smallest ranks are "
            f"predicted to give {fastest:.2f}"
        )
    return best
