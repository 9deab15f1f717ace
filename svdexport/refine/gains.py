"""The gains of a quantised model's norms, trained towards the dense model's logits.

What quantisation leaves in float is a few thousand gains; they take back a part of what it has
changed. Norm tweaking (Li et al., AAAI 2024, arXiv 2309.02784) does so layer by layer; here it is
the divergence of the next token that is lowered, through the whole model.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdexport.recipe.refiners import Tune
from svdexport.refine.base import Decoder, Refined, RefineData
from svdexport.refine.logits import match_logits, notes
from svdexport.refine.training import Schedule


class _Relative(nn.Module):
    """w (1 + s): a step of s is a share of the gain, whatever its size."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, share: Tensor) -> Tensor:
        return self.weight * (1 + share)  # type: ignore[no-any-return, operator]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def norms(decoder: Decoder) -> dict[str, nn.Module]:
    """The norms of the blocks by path: modules so called that have a vector for a weight.

    The last norm is not among them: gradients reach the output of the last block alone.
    """
    named = {
        f"{path}.{name}": part
        for path in decoder.blocks
        for name, part in decoder.module.get_submodule(path).named_modules()
        if type(part).__name__.endswith("Norm") and hasattr(part, "weight")
    }
    return {name: part for name, part in named.items() if gain(part).ndim == 1}


def gain(norm: nn.Module) -> Tensor:
    """A norm's weight."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def tune(data: RefineData, config: Tune, dense: Decoder, names: Collection[str]) -> Refined:
    """Train the gains of the norms of these names, by Adam on their relative change.

    Args:
        data: with the quantised model as its student. dense: the model that it stands for.
    """
    chosen = {name: part for name, part in norms(data.student).items() if name in names}
    for part in chosen.values():
        parametrize.register_parametrization(part, "weight", _Relative(gain(part)), unsafe=True)
    trained = {
        f"{name}.weight": part.parametrizations["weight"].original  # type: ignore[index, union-attr]
        for name, part in chosen.items()
    }
    schedule = Schedule(
        config.steps, config.minutes, config.learning_rate, config.warmup, config.patience
    )
    course = match_logits("tune", data, config, trained, schedule, dense)
    for part in chosen.values():
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    tensors = {f"{name}.weight": gain(part).clone() for name, part in chosen.items()}
    return Refined(tensors, tuple(notes("tune", data, config, course)))  # type: ignore[arg-type]
