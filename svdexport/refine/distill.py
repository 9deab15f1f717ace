"""Distillation: the pairs are trained towards the dense model's next-token distribution."""

from __future__ import annotations

from torch import nn

from svdexport.core.linears import is_linear, is_transposed
from svdexport.errors import RecipeError
from svdexport.recipe.refiners import Distill
from svdexport.refine.base import Refined, RefineData, Refiner
from svdexport.refine.logits import match_logits, notes
from svdexport.refine.pairs import balance_pairs, pair_parameters
from svdexport.refine.training import Schedule


def refine(data: RefineData, config: Distill) -> Refined:
    """Train A and B of every pair, from the balanced gauge (see ``core.gauge``).

    Embedding, norms, biases and head stay: the norm before a pair is a scale that A can take over.
    """
    module = data.student.module
    balance_pairs(module, data.groups)
    trained = trained_parameters(data, config)
    schedule = Schedule(
        config.steps, config.minutes, config.learning_rate, config.warmup, config.patience
    )
    course = match_logits("distill", data, config, trained, schedule)
    tensors = {name: weight.detach().float().cpu() for name, weight in trained.items()}
    return Refined(tensors, tuple(notes("distill", data, config, course)))


def trained_parameters(data: RefineData, config: Distill) -> dict[str, nn.Parameter]:
    """What is trained, by the checkpoint's tensor names. Raises RecipeError where it is nothing."""
    module = data.student.module
    found = pair_parameters(module, data.groups)
    if config.train == "linears":
        pairs = {name for members in data.groups.values() for name in members}
        for path in data.student.blocks:
            for name, part in module.get_submodule(path).named_modules():
                full = f"{path}.{name}"
                inside = full.endswith((".lr_a", ".lr_b"))
                if is_linear(part) and not (is_transposed(part) or inside or full in pairs):
                    found[f"{full}.weight"] = part.weight  # type: ignore[assignment]
    if not found:
        raise RecipeError(f"{data.where}: no linear became a pair: there is nothing to refine")
    return found


REFINER = Refiner(
    "distill",
    "distillation of the pairs from the dense model's logits",
    "Hinton et al., 2015, arXiv 1503.02531; trained on pairs after SVD-LLM's update",
    refine,
)
