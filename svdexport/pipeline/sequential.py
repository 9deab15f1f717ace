"""``compress.sequential``: factors made anew, in the order of the layers, for what came before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from svdexport.core.decompose import decompose
from svdexport.core.gauge import in_even_gauge, mixed
from svdexport.core.linears import is_transposed
from svdexport.core.lowrank import FactorPair
from svdexport.core.moments import CrossMoments
from svdexport.core.sequence import sequence_target
from svdexport.factorize import split_outputs
from svdexport.models.blocks import InputGroup, Structure
from svdexport.models.calibrate import Progress
from svdexport.models.sequence import Walk
from svdexport.models.weights import Weights
from svdexport.pipeline.compress import GroupPlan
from svdexport.pipeline.factor_files import factors_file, gradients_of
from svdexport.recipe import Recipe

MIX = 1.0  # weight of the original inputs beside the compressed model's (core/sequence.py)


def fitted_dense(model: nn.Module, plan: list[GroupPlan]) -> list[str]:
    """Linears that stay dense and get a fitted weight: all but transposed ones (Conv1D)."""
    return [
        member.name
        for entry in plan
        if entry.allocation.rank is None
        for member in entry.group.members
        if not is_transposed(model.get_submodule(member.name))
    ]


def pair_in_sequence(
    recipe: Recipe,
    group: InputGroup,
    target: Tensor,
    metric: Tensor,
    inputs: Tensor,
    rank: int,
    folder: Path,
) -> FactorPair:
    """A group's pair made anew, B's of its members stacked, in the gauge that is written.

    Args:
        target, metric: of :func:`svdexport.core.sequence.sequence_target`. inputs: H of what the
            compressed model gives the group. folder: of the factor files; where the method has
            gradients' moments they lie there and weight the error.
    """
    found = decompose(
        split_outputs(target, [member.out_features for member in group.members]),
        metric,
        gradients_of(group, factors_file(folder, group.block)),
        max_rank=rank,
        output_damping=recipe.compress.damping,
    )
    even = in_even_gauge(found, inputs)
    return FactorPair(*mixed(even.a, even.b))


def refactor_in_sequence(
    recipe: Recipe,
    weights: Weights,
    structure: Structure,
    plan: list[GroupPlan],
    tokens: Tensor,
    folder: Path,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors of every block: pairs, and dense linears, fitted in sequence.

    Ranks are those of the plan. Where the method has gradients' moments, they weight the error as
    they did when the ranks were chosen.

    Args:
        tokens: calibration samples, (samples, length). folder: of the factor files.
    """
    dense = set(fitted_dense(weights.model, plan))
    ranks = {entry.group.leader: entry.allocation.rank for entry in plan}
    made: dict[str, Tensor] = {}

    def refit(
        group: InputGroup, own: Sequence[Tensor], moments: CrossMoments
    ) -> Sequence[Tensor] | None:
        rank = ranks[group.leader]
        if rank is None and group.leader not in dense:
            return None
        sizes = [member.out_features for member in group.members]
        target, metric = sequence_target(torch.cat(list(own)), moments, MIX)
        if rank is None:
            new = split_outputs(target.float(), sizes)
            made.update({f"{m.name}.weight": w for m, w in zip(group.members, new, strict=True)})
            return new
        pair = pair_in_sequence(recipe, group, target, metric, moments.compressed, rank, folder)
        second = split_outputs(pair.b, sizes)
        made[f"{group.leader}.lr_a.weight"] = pair.a
        made.update(
            {f"{m.name}.lr_b.weight": b for m, b in zip(group.members, second, strict=True)}
        )
        return [part @ pair.a for part in second]

    walk = Walk(
        weights,
        structure,
        [entry.group for entry in plan],
        tokens,
        batch=recipe.calibration.batch,
        scratch=folder,
    )
    for _ in walk.run(refit, progress):
        yield dict(made)
        made.clear()
