"""The way through a model and its compressed self side by side, group of linears by group.

Each group meets the inputs that it will have behind the compressed layers before it, so that what
is done to it can make up for what was lost there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.moments import CrossMoments
from svdexport.models.activations import Activations
from svdexport.models.blocks import InputGroup, Structure, record_inputs, run_block
from svdexport.models.calibrate import Progress
from svdexport.models.modules import linear_weight, set_linear_weight
from svdexport.models.weights import Weights

# Of a group, its weights (m_i, n) and moments: the weights that it gets; None leaves it as it is.
Refit = Callable[[InputGroup, Sequence[Tensor], CrossMoments], Sequence[Tensor] | None]

_ORIGINAL, _COMPRESSED = 0, 1  # boundaries in the activations' file


@dataclass(frozen=True)
class Batch:
    """Samples that run together: which they are, and the blocks' further arguments for them."""

    span: slice
    calls: Sequence[Any]

    @property
    def samples(self) -> int:
        return int(self.span.stop - self.span.start)


class Walk:
    """Refits the groups of a model in the order in which they run.

    Args:
        groups: what is refitted; others stay as they are.
        tokens: calibration samples, (samples, length), int64; ``batch`` of them run together.
        scratch: folder for a file of 8 bytes x samples x length x width.
    """

    def __init__(
        self,
        weights: Weights,
        structure: Structure,
        groups: Sequence[InputGroup],
        tokens: Tensor,
        *,
        batch: int,
        scratch: Path,
    ) -> None:
        self.weights, self.structure, self.groups = weights, structure, groups
        self.tokens, self.size, self.scratch = tokens, batch, scratch

    @torch.no_grad()
    def run(self, refit: Refit, progress: Progress) -> Iterator[int]:
        """Yield every block that is finished; behind it the model has its own weights again.

        In memory at a time: a block, and the inputs of its linears for all samples.
        """
        self.weights.model.eval().requires_grad_(False)
        store, batches = self._embed()
        try:
            for index in range(len(self.structure.blocks)):
                self._block(index, refit, store, batches)
                progress("in sequence", index + 1, len(self.structure.blocks))
                yield index
        finally:
            store.close()

    def _embed(self) -> tuple[Activations, list[Batch]]:
        """Inputs of the first block, the same for both streams."""
        count, length = self.tokens.shape
        batches: list[Batch] = []
        with self.weights.ends() as model:
            width = record_inputs(model, self.structure, self.tokens[:1]).hidden.shape[-1]
            store = Activations(self.scratch / "sequence.bin", count, length, width)
            for start in range(0, count, self.size):
                span = slice(start, min(start + self.size, count))
                found = record_inputs(model, self.structure, self.tokens[span])
                batches.append(Batch(span, found.calls))
                for stream in (_ORIGINAL, _COMPRESSED):
                    store.put(stream, span, found.hidden)
        return store, batches

    def _block(self, index: int, refit: Refit, store: Activations, batches: list[Batch]) -> None:
        groups = [group for group in self.groups if group.block == index]

        def run(block: nn.Module, stream: int, keep: bool) -> None:
            for batch in batches:
                hidden = store.get(stream, batch.span, batch.samples)
                out = run_block(block, hidden, batch.calls[index])
                if keep:
                    store.put(stream, batch.span, out)

        with self.weights.block(self.structure.blocks[index]) as block, _restored(self, groups):
            with self._inputs(groups) as originals:
                run(block, _ORIGINAL, keep=True)
            for group in groups:
                with self._inputs([group]) as given:
                    run(block, _COMPRESSED, keep=False)
                moments = CrossMoments.of(originals.pop(group.leader), given[group.leader])
                modules = self._modules(group)
                new = refit(group, [linear_weight(module) for module in modules], moments)
                for module, weight in zip(modules, new or (), strict=bool(new)):
                    set_linear_weight(module, weight)
            run(block, _COMPRESSED, keep=True)

    def _modules(self, group: InputGroup) -> list[nn.Module]:
        return [self.weights.model.get_submodule(member.name) for member in group.members]

    @contextlib.contextmanager
    def _inputs(self, groups: Sequence[InputGroup]) -> Iterator[dict[str, list[Tensor]]]:
        """By leader, the inputs (rows, n) that the groups are called with, batch by batch."""
        found: dict[str, list[Tensor]] = {group.leader: [] for group in groups}
        with contextlib.ExitStack() as stack:
            for leader, rows in found.items():

                def note(_m: Any, args: Any, rows: list[Tensor] = rows) -> None:
                    rows.append(args[0].reshape(-1, args[0].shape[-1]))

                module = self.weights.model.get_submodule(leader)
                stack.callback(module.register_forward_pre_hook(note).remove)
            yield found


@contextlib.contextmanager
def _restored(walk: Walk, groups: Sequence[InputGroup]) -> Iterator[None]:
    """Put the groups' own weights back at the end."""
    modules = [module for group in groups for module in walk._modules(group)]
    own = [module.weight for module in modules]
    try:
        yield
    finally:
        for module, weight in zip(modules, own, strict=True):
            module.weight = weight
