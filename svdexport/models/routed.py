"""Statistics of experts that got few tokens of the calibration text.

A moment of fewer rows than its width is singular, and of no rows it says nothing. There the moment
of all the layer's experts stands in, scaled to the expert's own number of tokens. As every token
goes to the same number of experts, that is, for the linears that read the layer's input, the
moment of this input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from svdexport.core.moments import FirstRows, Fisher, MeanAbs, Moment
from svdexport.models.blocks import InputGroup


@dataclass
class Collected:
    """What is summed up for the linears of a block, by name; see ``BlockMoments``."""

    inputs: dict[str, Moment] = field(default_factory=dict)
    gradients: dict[str, Moment] = field(default_factory=dict)
    sampled_gradients: dict[str, Moment] = field(default_factory=dict)
    mean_abs: dict[str, MeanAbs] = field(default_factory=dict)
    fisher: dict[str, Fisher] = field(default_factory=dict)
    rows: dict[str, FirstRows] = field(default_factory=dict)

    def all(self) -> list[Moment | MeanAbs | Fisher | FirstRows]:
        """Each once, in the same order in every process."""
        parts = (
            self.inputs,
            self.mean_abs,
            self.rows,
            self.gradients,
            self.sampled_gradients,
            self.fisher,
        )
        found = {id(one): one for part in parts for one in part.values()}  # type: ignore[attr-defined]
        return list(found.values())


def borrow(groups: Sequence[InputGroup], found: Collected) -> dict[str, int]:
    """Let experts with few tokens borrow, in place; returns the tokens of those linears by name.

    Args:
        groups: a block's, each of one expert's linears that share an input.
    """
    alike: dict[str, list[InputGroup]] = {}
    for group in groups:
        if group.stack is not None:
            alike.setdefault(group.stack, []).append(group)
    few: dict[str, int] = {}
    for experts in alike.values():
        poor = [g for g in experts if found.inputs[g.leader].rows < g.members[0].in_features]
        if poor:
            few |= _lend(experts, poor, found)
    return few


def _lend(
    experts: Sequence[InputGroup], poor: Sequence[InputGroup], found: Collected
) -> dict[str, int]:
    leaders = [group.leader for group in experts]
    tokens = sum(found.inputs[name].rows for name in leaders)
    moment = _sum([found.inputs[name].matrix for name in leaders])
    rows = [part for name in leaders if name in found.rows for part in found.rows[name].parts]
    mean_abs = [found.mean_abs[name].total for name in leaders if name in found.mean_abs]
    own = {group.leader: found.inputs[group.leader].rows for group in poor}
    for number in range(len(experts[0].members)):
        names = [group.members[number].name for group in experts]
        for sums in (found.gradients, found.sampled_gradients, found.fisher):
            if names[0] not in sums:
                continue
            lent = _sum([sums[name].matrix for name in names])
            for group in poor:
                name, share = group.members[number].name, max(1, own[group.leader]) / max(1, tokens)
                sums[name].matrix = lent * share
    for group in poor:
        leader, share = group.leader, max(1, own[group.leader]) / max(1, tokens)
        found.inputs[leader].matrix = moment * share  # members share the object
        if mean_abs:
            found.mean_abs[leader].total = _sum(mean_abs)
            found.mean_abs[leader].rows = tokens
        if rows:
            found.rows[leader].take(rows)
    return {m.name: own[group.leader] for group in poor for m in group.members}


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
