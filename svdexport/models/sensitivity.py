"""What the model loses when one group of linears alone is truncated (ASVD's sensitivity)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from svdexport.core.linears import is_transposed
from svdexport.core.lowrank import FactorPair
from svdexport.models.blocks import InputGroup, Structure, record_inputs, run_block, tail_loss
from svdexport.models.calibrate import Progress
from svdexport.models.modules import linear_shape

Trials = Sequence[tuple[InputGroup, Sequence[FactorPair]]]


def perplexities(
    model: nn.Module,
    structure: Structure,
    tokens: Tensor,
    trials_of: Callable[[int], Trials],
    progress: Progress = lambda what, done, total: None,
) -> tuple[float, dict[str, list[float]]]:
    """Perplexity of the dense model, and with each pair alone in its group's place.

    A trial runs the blocks from its own on; what comes before is computed once.

    Args:
        tokens: (samples, length), all run at once. trials_of: the trials of a block.

    Returns: dense perplexity; by leader, one perplexity for each pair.
    """
    recorded = record_inputs(model, structure, tokens)
    hidden, total = recorded.hidden, len(structure.blocks)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)

    def run(start: int, state: Tensor) -> float:
        with torch.no_grad():
            for index in range(start, total):
                block = model.get_submodule(structure.blocks[index])
                state = run_block(block, state, recorded.calls[index])
            loss = tail_loss(model, structure, tokens, state) / predicted
        return float(torch.exp(loss.double()))

    dense = run(0, hidden)
    found: dict[str, list[float]] = {}
    for index in range(total):
        for group, pairs in trials_of(index):
            found[group.leader] = []
            for pair in pairs:
                with _replaced(model, group, pair):
                    found[group.leader].append(run(index, hidden))
        with torch.no_grad():
            block = model.get_submodule(structure.blocks[index])
            hidden = run_block(block, hidden, recorded.calls[index])
        progress("sensitivity", index + 1, total)
    return dense, found


@contextlib.contextmanager
def _replaced(model: nn.Module, group: InputGroup, pair: FactorPair) -> Iterator[None]:
    """The group's weights are B A for as long as the context lasts."""
    modules = [model.get_submodule(member.name) for member in group.members]
    weights: list[Tensor] = [module.weight for module in modules]  # type: ignore[misc]
    before = [weight.data for weight in weights]
    parts = torch.split(pair.dense(), [linear_shape(module)[0] for module in modules])
    try:
        for module, weight, part in zip(modules, weights, parts, strict=True):
            weight.data = (part.T if is_transposed(module) else part).to(weight.dtype).contiguous()
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
