"""Compressing a model that is in memory: the stages of a run up to the pairs, and no files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdexport.errors import RecipeError
from svdexport.models.blocks import discover
from svdexport.models.modules import LowRankLinear, replace_linears
from svdexport.pipeline import compress, speed_budget
from svdexport.pipeline.factors import chosen_groups, factorize_blocks
from svdexport.pipeline.reporter import Reporter
from svdexport.pipeline.trials import measured
from svdexport.recipe import validate
from svdexport.report.result import PlanRow


def compress_in_memory(
    model: Any, tokens: Tensor, settings: dict[str, Any], batch: int, reporter: Reporter
) -> tuple[PlanRow, ...]:
    """Replace the chosen linears of ``model`` by pairs; returns the plan, one row a linear.

    ``settings`` are the keys of a recipe's ``compress`` section. Raises RecipeError for a wrong
    one, and for tokens that are not (windows, length).
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise RecipeError(
            f"tokens: of shape {tuple(tokens.shape)} and type {tokens.dtype}; give token ids "
            "(windows, length) as integers"
        )
    recipe = validate(
        {
            "schema": 1,
            "model": {"path": "in memory"},
            "calibration": {"batch": batch},
            "compress": settings,
            "export": [{"format": "checkpoint"}],
        },
        "compress_model",
    )
    if recipe.compress.method == "emb_ae" or recipe.compress.sequential:
        raise RecipeError("compress_model: method emb_ae and sequential: true need a whole run")
    other = next((p for p in model.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise RecipeError(
            f"compress_model: the model has {other.dtype} weights; give it in float32, as by "
            "model.float()"
        )
    training = model.training
    structure = discover(model)
    with tempfile.TemporaryDirectory(prefix="svdexport-") as scratch:
        folder = Path(scratch) / "factors"
        factorize_blocks(recipe, structure, model, tokens.long(), folder, reporter)
        more = measured(recipe, structure, folder, model, tokens.long(), reporter.progress)
        budget, speed = recipe.compress.budget, None
        if budget is not None and budget.speedup is not None:
            speed = speed_budget.measure(chosen_groups(recipe, structure), structure)
        plan = compress.allocate_ranks(recipe, structure, folder, more, speed)
        low_rank = compress.low_rank_of(plan, structure)
        biases = {name: model.get_submodule(name).bias for name in low_rank}
        replace_linears(model, low_rank)
        for tensors in compress.pair_tensors(recipe.compress, plan, folder):
            for name, value in tensors.items():
                _put(model, name, value)
    for name, bias in biases.items():
        module = model.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        module.bias = bias
    model.train(training)
    return tuple(compress.plan_rows(plan))


def _put(model: Any, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    parameter = getattr(model.get_submodule(owner), attribute)
    with torch.no_grad():
        parameter.copy_(value)
