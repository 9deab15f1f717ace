"""Low-rank updates of the pairs, trained one side after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdexport.errors import RecipeError
from svdexport.recipe.refiners import Lora
from svdexport.refine.base import Refined, RefineData, Refiner
from svdexport.refine.logits import match_logits, notes
from svdexport.refine.pairs import balance_pairs, pair_tensors
from svdexport.refine.training import Schedule


class _Update(nn.Module):
    """weight -> weight + up down, (m, n) + (m, r) (r, n); nothing at first, since up is 0."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn((rank, columns), generator=generator) / columns**0.5
        self.up = nn.Parameter(torch.zeros((rows, rank)).to(weight))
        self.down = nn.Parameter(down.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def refine(data: RefineData, config: Lora) -> Refined:
    """Train an update of rank r of every B and merge it, then of every A (SVD-LLM, section 3.3).

    The loss is the divergence from the dense model rather than SVD-LLM's next-token loss: it needs
    no further text and does not teach the model the calibration text.
    """
    module = data.student.module
    if not data.groups:
        raise RecipeError(f"{data.where}: no linear became a pair: there is nothing to refine")
    balance_pairs(module, data.groups)
    schedule = Schedule(
        None if config.steps is None else (config.steps + 1) // 2,
        None if config.minutes is None else config.minutes / 2,
        config.learning_rate,
        config.warmup,
        config.patience,
    )
    seconds = [f"{name}.lr_b" for members in data.groups.values() for name in members]
    firsts = [f"{leader}.lr_a" for leader in data.groups]
    said: list[str] = []
    for number, (side, factors) in enumerate((("B", seconds), ("A", firsts))):
        generator = torch.Generator().manual_seed(2 * config.seed + number)
        with updated(module, factors, config.rank, generator) as trained:
            name = f"lora {side}"
            course = match_logits(name, data, config, trained, schedule)
            said += notes(name, data, config, course)
    return Refined(pair_tensors(module, data.groups), tuple(said))


@contextmanager
def updated(
    module: nn.Module, factors: list[str], rank: int, generator: torch.Generator
) -> Iterator[dict[str, nn.Parameter]]:
    """Give each named linear an update, to be trained while the block lasts and merged after it."""
    trained: dict[str, nn.Parameter] = {}
    for name in factors:
        linear = module.get_submodule(name)
        weight: Tensor = linear.weight  # type: ignore[assignment]
        update = _Update(weight, min(rank, *weight.shape), generator)
        parametrize.register_parametrization(linear, "weight", update)
        trained |= {f"{name}.up": update.up, f"{name}.down": update.down}
    try:
        yield trained
    finally:
        for name in factors:
            linear = module.get_submodule(name)
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


REFINER = Refiner(
    "lora",
    "low-rank updates of B, then of A",
    "SVD-LLM's parameter update, Wang et al., ICLR 2025, arXiv 2403.07378",
    refine,
)
