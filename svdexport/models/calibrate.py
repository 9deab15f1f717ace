"""Calibration, block by block: second moments of the linears' inputs and of their output gradients.

One block is worked on at a time. Without gradients one forward sweep is enough. With gradients the
forward sweep keeps each block's input in a scratch file; then, from the last block to the first,
a block is recomputed with gradients on and the gradient is handed down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svdexport.core.moments import Moment
from svdexport.errors import InputError
from svdexport.models.blocks import Structure, record_inputs, run_block, tail_gradient

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class BlockMoments:
    """Moments of one block: H by linear (shared where the input is), G by linear or empty."""

    block: int
    inputs: dict[str, Moment]
    gradients: dict[str, Moment]


def calibrate(
    model: nn.Module,
    structure: Structure,
    tokens: Tensor,
    *,
    batch: int,
    gradients: bool,
    scratch: Path,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BlockMoments]:
    """Yield the moments of every block; in order, or from the last to the first with gradients.

    Args:
        tokens: calibration samples, (samples, length), int64.
        batch: samples that run together.
        gradients: also the moments of the output gradients of the next-token loss.
        scratch: folder for the activations of all block boundaries (only with gradients:
            4 bytes x samples x length x width x (blocks + 1)).
    """
    model.eval().requires_grad_(False)
    sweep = _Sweep(model, structure, tokens, batch)
    if not gradients:
        yield from sweep.forward(progress)
        return
    shape = (len(structure.blocks) + 1, *tokens.shape, sweep.width)
    path = scratch / "activations.bin"
    store = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
    try:
        yield from sweep.backward(store, progress)
    finally:
        del store
        path.unlink(missing_ok=True)


class _Sweep:
    """The samples' way through the blocks of one model."""

    def __init__(self, model: nn.Module, structure: Structure, tokens: Tensor, batch: int) -> None:
        self.model, self.structure, self.tokens = model, structure, tokens
        self.slices = [slice(i, i + batch) for i in range(0, tokens.shape[0], batch)]
        recorded = record_inputs(model, structure, tokens[:1])
        self.width = recorded.hidden.shape[-1]
        self._calls: dict[int, Any] = {}

    def embed(self, part: slice) -> Tensor:
        return record_inputs(self.model, self.structure, self.tokens[part]).hidden

    def call(self, part: slice, block: int) -> Any:
        """Arguments of a block: they depend on the batch's size alone, no sample is padded."""
        size = self.tokens[part].shape[0]
        if size not in self._calls:
            inputs = record_inputs(self.model, self.structure, self.tokens[part])
            self._calls[size] = inputs.calls
        return self._calls[size][block]

    def forward(self, progress: Progress) -> Iterator[BlockMoments]:
        hidden = [self.embed(part) for part in self.slices]
        total = len(self.structure.blocks)
        for index, path in enumerate(self.structure.blocks):
            block = self.model.get_submodule(path)
            watch = _Watch(self.model, self.structure, index)
            with watch, torch.no_grad():
                for i, part in enumerate(self.slices):
                    hidden[i] = run_block(block, hidden[i], self.call(part, index))
            progress("calibrate", index + 1, total)
            yield watch.moments()

    def backward(self, store: np.memmap[Any, Any], progress: Progress) -> Iterator[BlockMoments]:
        total = len(self.structure.blocks)
        for part in self.slices:
            store[0, part] = self.embed(part).numpy()
        for index, path in enumerate(self.structure.blocks):
            block = self.model.get_submodule(path)
            with torch.no_grad():
                for part in self.slices:
                    out = run_block(block, self._load(store, index, part), self.call(part, index))
                    store[index + 1, part] = out.numpy()
            progress("forward", index + 1, total)
        gradients = [self._tail(store[total, part], self.tokens[part]) for part in self.slices]
        for index in reversed(range(total)):
            yield self._backward_block(store, index, gradients)
            progress("calibrate", total - index, total)

    def _load(self, store: np.memmap[Any, Any], index: int, part: slice) -> Tensor:
        return torch.from_numpy(np.array(store[index, part]))

    def _tail(self, hidden: np.ndarray, tokens: Tensor) -> Tensor:
        """One sample at a time: the head's logits are the widest tensor of the model."""
        rows = [
            tail_gradient(
                self.model, self.structure, tokens[i : i + 1], torch.from_numpy(hidden[i : i + 1])
            )
            for i in range(tokens.shape[0])
        ]
        return torch.cat(rows)

    def _backward_block(
        self, store: np.memmap[Any, Any], index: int, gradients: list[Tensor]
    ) -> BlockMoments:
        block = self.model.get_submodule(self.structure.blocks[index])
        watch = _Watch(self.model, self.structure, index, gradients=True)
        with watch, torch.enable_grad():
            for i, part in enumerate(self.slices):
                hidden = self._load(store, index, part).requires_grad_(True)
                out = run_block(block, hidden, self.call(part, index))
                (gradients[i],) = torch.autograd.grad(out, hidden, gradients[i])
        return watch.moments()


class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """Hooks on the linears of one block that add to the moments while it runs."""

    def __init__(
        self, model: nn.Module, structure: Structure, index: int, gradients: bool = False
    ) -> None:
        self.model, self.index = model, index
        self.groups = structure.of_block(index)
        self.inputs: dict[str, Moment] = {}
        self.gradients: dict[str, Moment] = {}
        for group in self.groups:
            shared = Moment(group.members[0].in_features)
            self.inputs.update(dict.fromkeys((m.name for m in group.members), shared))
            if gradients:
                self.gradients |= {m.name: Moment(m.out_features) for m in group.members}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        for group in self.groups:
            leader = self.model.get_submodule(group.leader)
            add = self.inputs[group.leader].add

            def note(_m: Any, args: Any, _k: Any, add: Callable[[Tensor], None] = add) -> None:
                add(args[0])

            hook = leader.register_forward_pre_hook(note, with_kwargs=True)
            self.stack.callback(hook.remove)
        for name, moment in self.gradients.items():

            def watch(_m: Any, _a: Any, out: Tensor, moment: Moment = moment) -> None:
                out.register_hook(moment.add)  # type: ignore[no-untyped-call]

            hook = self.model.get_submodule(name).register_forward_hook(watch)
            self.stack.callback(hook.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def moments(self) -> BlockMoments:
        for name, moment in {**self.inputs, **self.gradients}.items():
            if not torch.isfinite(moment.matrix).all():
                raise InputError(f"{name}: activations overflow on the calibration text")
        return BlockMoments(self.index, self.inputs, self.gradients)
