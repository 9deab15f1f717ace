"""``plan``: what a recipe would do, from the model's configuration alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from svdexport.allocate import Allocation, uniform
from svdexport.core.machine import free_memory
from svdexport.models.blocks import InputGroup
from svdexport.models.loader import Source, configuration_of
from svdexport.models.shapes import Shapes, shapes_of
from svdexport.pipeline import estimate, speed_budget
from svdexport.pipeline.compress import NOTHING_ASKED, candidate
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.job import decide_memory
from svdexport.pipeline.sizes import exports_of
from svdexport.pipeline.stages import check_kind, check_streamed
from svdexport.recipe import Compress, Recipe


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Ranks, parameters, bytes, memory and time. Reads the configuration, not the weights.

    Every strategy but ``uniform`` needs factors to choose ranks; until then the same budget is
    shown as uniform ranks, and ``ranks`` says so.
    """
    compress = recipe.compress
    with tempfile.TemporaryDirectory(prefix="svdexport-") as scratch:
        source = _source(recipe, Path(scratch))
        shapes = shapes_of(source.folder, source.trust_remote_code)
        _check(recipe, source, shapes)
        groups = chosen_groups(recipe, shapes.structure)
        chosen, speedup = _ranks(recipe, shapes, groups)
        exports = exports_of(recipe, source, shapes, groups, chosen, Path(scratch))
    alike: dict[str, list[InputGroup]] = {}  # the experts of a layer in one row
    for group in groups:
        alike.setdefault(group.stack or group.leader, []).append(group)
    rows = []
    for together in alike.values():
        choice = chosen[together[0].leader]
        item = candidate(together[0], recipe.remapped)
        rows.append(
            {
                "block": item.block,
                "linears": [member.name for group in together for member in group.members],
                "shape": [item.out_features, item.in_features],
                "rank": choice.rank,
                "reason": choice.reason,
                "params_dense": len(together) * item.dense_params,
                "params": len(together) * item.cost(choice.rank),
            }
        )
    dense = sum(candidate(group).dense_params for group in groups)
    params = sum(
        candidate(group, recipe.remapped).cost(chosen[group.leader].rank) for group in groups
    )
    return {
        "model": str(source.given),
        "method": compress.method,
        "ranks": _kind_of_ranks(compress),
        "groups": rows,
        "params_model": shapes.count,
        "params_dense": dense,
        "params": params,
        "kept": params / dense if dense else 1.0,  # without a method all stays dense
        "predicted_speedup": speedup,
        "exports": exports,
        "memory_bytes": estimate.memory_bytes(recipe, shapes),
        "seconds": estimate.seconds(recipe, shapes, groups),
    }


def _check(recipe: Recipe, source: Source, shapes: Shapes) -> None:
    """What a run would refuse. Raises RecipeError."""
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    check_kind(recipe, config)
    if recipe.compress.stream == "always":  # else the machine of the run decides
        size = shapes.count * estimate.BYTES_F32
        check_streamed(recipe, lambda: decide_memory("always", size, free_memory()))


def _kind_of_ranks(compress: Compress) -> str:
    if compress.method == "none":
        return "no"
    fixed = compress.allocate == "uniform"
    return "uniform" if fixed else f"uniform preview of {compress.allocate}"


def _ranks(
    recipe: Recipe, shapes: Shapes, groups: list[InputGroup]
) -> tuple[dict[str, Allocation], float | None]:
    """Uniform ranks, and what they are predicted to gain where the budget is a speedup."""
    compress = recipe.compress
    if compress.method == "none":
        return {group.leader: NOTHING_ASKED for group in groups}, None
    items = [candidate(group, recipe.remapped) for group in groups]

    def allocate(ratio: float) -> dict[str, Allocation]:
        return uniform.allocate(items, ratio, compress.rank_multiple)

    if compress.budget is None or compress.budget.speedup is None:
        return allocate(compress.kept), None
    model = speed_budget.measure(groups, shapes.structure)
    chosen = speed_budget.choose(model, compress.budget.speedup, allocate)
    return chosen, model.speedup(chosen)


def _source(recipe: Recipe, work: Path) -> Source:
    """A folder is not opened further: its weights may not be there."""
    if recipe.model.path is not None:
        return Source(recipe.model.path, None, recipe.model.trust_remote_code)
    assert recipe.model.gguf is not None
    return Source(configuration_of(recipe.model.gguf, work / "source"), recipe.model.gguf)
