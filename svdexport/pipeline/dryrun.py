"""``plan``: what a recipe would do, from the model's configuration alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from svdexport.allocate import uniform
from svdexport.core.moments import NEED_GRADIENTS
from svdexport.models.blocks import InputGroup, Structure
from svdexport.models.loader import open_source, structure_of
from svdexport.pipeline.compress import candidate
from svdexport.pipeline.factors import chosen_groups, statistics
from svdexport.recipe import Recipe

BYTES_F32, BYTES_F64 = 4, 8


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Rows per linear, parameters, and memory. Reads the model's headers, not its weights.

    Every strategy but ``uniform`` needs factors to choose ranks; until then the same budget is
    shown as uniform ranks, and ``ranks`` says so.
    """
    with tempfile.TemporaryDirectory(prefix="svdexport-") as scratch:
        source = open_source(recipe.model, Path(scratch))
        structure = structure_of(source.folder, source.trust_remote_code)
    groups = chosen_groups(recipe, structure)
    compress = recipe.compress
    chosen = uniform.allocate(
        [candidate(group) for group in groups], compress.kept, compress.rank_multiple
    )
    rows = []
    for group in groups:
        choice = chosen[group.leader]
        item = candidate(group)
        rows.append(
            {
                "block": group.block,
                "linears": [member.name for member in group.members],
                "shape": [item.out_features, item.in_features],
                "rank": choice.rank,
                "reason": choice.reason,
                "params_dense": item.dense_params,
                "params": item.cost(choice.rank),
            }
        )
    dense = sum(candidate(group).dense_params for group in groups)
    params = sum(candidate(group).cost(chosen[group.leader].rank) for group in groups)
    return {
        "model": str(source.given),
        "method": compress.method,
        "ranks": "uniform"
        if compress.allocate == "uniform"
        else f"uniform preview of {compress.allocate}",
        "groups": rows,
        "params_dense": dense,
        "params": params,
        "kept": params / dense,
        "memory_bytes": _memory(recipe, structure, groups),
    }


def _memory(recipe: Recipe, structure: Structure, groups: list[InputGroup]) -> dict[str, int]:
    """Estimated peak: weights in float32, the moments of one block, and the activations on disk."""
    needs = statistics(recipe)
    gradients = bool(NEED_GRADIENTS & needs)
    weights = sum(linear.params for linear in structure.linears()) * BYTES_F32
    moments = 0
    for group in structure.of_block(0):
        if needs:
            moments += group.members[0].in_features ** 2 * BYTES_F64
        if "gradients" in needs:
            moments += sum(member.out_features**2 for member in group.members) * BYTES_F64
        if "fisher" in needs:
            moments += sum(member.params for member in group.members) * BYTES_F64
    width = groups[0].members[0].in_features
    tokens = recipe.calibration.samples * recipe.calibration.length
    boundaries = len(structure.blocks) + 1 if gradients else 1
    return {
        "weights": weights,
        "moments_of_a_block": moments,
        "activations": tokens * width * BYTES_F32 * boundaries if needs else 0,
    }
