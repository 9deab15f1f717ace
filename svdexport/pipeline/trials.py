"""What an allocation strategy wants measured on the model itself, before ranks are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from svdexport.allocate import STRATEGIES
from svdexport.core.lowrank import FactorPair, round_rank
from svdexport.models.blocks import InputGroup, Structure
from svdexport.models.calibrate import Progress
from svdexport.models.sensitivity import Trials, perplexities
from svdexport.models.truncation import learn_positions
from svdexport.pipeline.compress import candidate
from svdexport.pipeline.factor_files import factors_file, pair_at
from svdexport.pipeline.factors import chosen_groups
from svdexport.recipe import Recipe
from svdexport.recipe.settings import AsvdTrials, DobiPositions


def measured(
    recipe: Recipe,
    structure: Structure,
    folder: Path,
    model: nn.Module,
    tokens: Tensor,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Further fields of ``Candidate`` by leader; empty where the strategy measures nothing.

    Args:
        folder: the factor files. model: with all its weights. tokens: the calibration text.
    """
    groups = chosen_groups(recipe, structure)
    wanted = STRATEGIES[recipe.compress.allocate].measure
    settings = recipe.compress.allocation
    if wanted == "sensitivity":
        assert isinstance(settings, AsvdTrials)
        text = tokens[: settings.samples, : settings.length]
        return _sensitivity(recipe, structure, groups, folder, model, text, progress)
    if wanted == "positions":
        assert isinstance(settings, DobiPositions)
        text = tokens[: settings.samples, : settings.length]
        ratio = recipe.compress.kept
        found = learn_positions(
            model, groups, text, ratio, settings, progress, remapped=recipe.remapped
        )
        return {leader: {"position": position} for leader, position in found.items()}
    return {}


def _sensitivity(
    recipe: Recipe,
    structure: Structure,
    groups: Sequence[InputGroup],
    folder: Path,
    model: nn.Module,
    tokens: Tensor,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    settings = recipe.compress.allocation
    assert isinstance(settings, AsvdTrials)

    def trials_of(block: int) -> Trials:
        chosen = [group for group in groups if group.block == block]
        if not chosen:
            return []
        tensors = load_file(factors_file(folder, block))
        return [(group, _pairs(recipe, group, tensors, settings.ratios)) for group in chosen]

    _, found = perplexities(model, structure, tokens, trials_of, progress)
    return {
        leader: {"trials": tuple(zip(settings.ratios, values, strict=True))}
        for leader, values in found.items()
    }


def _pairs(
    recipe: Recipe, group: InputGroup, tensors: dict[str, Tensor], ratios: Sequence[float]
) -> list[FactorPair]:
    item = candidate(group, recipe.remapped)
    limit = max([1, *item.ranks(1)])
    ranks = [min(limit, round_rank(r * item.dense_params / item.rank_params, 1)) for r in ratios]
    return [pair_at(recipe.compress, tensors, group.leader, rank) for rank in ranks]
