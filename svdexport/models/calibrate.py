"""Calibration, block by block: statistics of the linears' inputs and of their output gradients.

One block is worked on at a time. Without gradients one forward sweep is enough. With gradients the
forward sweep keeps each block's input in a scratch file; then, from the last block to the first,
a block is recomputed with gradients on and the gradient is handed down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svdexport.core.moments import (
    NEED_GRADIENTS,
    FirstRows,
    Fisher,
    MeanAbs,
    MeanCosine,
    Moment,
    Statistic,
)
from svdexport.errors import InputError
from svdexport.models.blocks import Structure, record_inputs, run_block, tail_gradient

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class BlockMoments:
    """Statistics of one block, by linear; empty where they were not asked for.

    Attributes:
        inputs: H; linears that share an input share it. gradients: G.
        mean_abs: mean of |x| (n,), shared as H is.
        fisher: sum over samples of the squared gradient of the weight, (m, n).
        rows: the first rows of the inputs, (keep_rows, n), shared as H is.
        similarity: mean cosine between the block's input and its output.
    """

    block: int
    inputs: dict[str, Moment]
    gradients: dict[str, Moment]
    mean_abs: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    similarity: float | None = None


def calibrate(
    model: nn.Module,
    structure: Structure,
    tokens: Tensor,
    *,
    batch: int,
    statistics: Collection[Statistic],
    scratch: Path,
    keep_rows: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BlockMoments]:
    """Yield the statistics of every block; in order, or last to first where gradients are needed.

    Args:
        tokens: calibration samples, (samples, length), int64.
        batch: samples that run together.
        statistics: what to collect; the inputs' moments always are. Gradients are those of the
            summed next-token loss.
        scratch: folder for the activations of all block boundaries (only for gradients:
            4 bytes x samples x length x width x (blocks + 1)).
        keep_rows: input rows of each linear that the statistic ``rows`` keeps in memory.
    """
    model.eval().requires_grad_(False)
    sweep = _Sweep(model, structure, tokens, batch, _Wanted(frozenset(statistics), keep_rows))
    if not NEED_GRADIENTS & sweep.wanted.statistics:
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


@dataclass(frozen=True)
class _Wanted:
    """What the hooks collect."""

    statistics: frozenset[Statistic]
    keep_rows: int


class _Sweep:
    """The samples' way through the blocks of one model."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        wanted: _Wanted,
    ) -> None:
        self.model, self.structure, self.tokens = model, structure, tokens
        self.wanted = wanted
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
            watch = _Watch(self.model, self.structure, index, self.wanted)
            with watch, torch.no_grad():
                for i, part in enumerate(self.slices):
                    out = run_block(block, hidden[i], self.call(part, index))
                    watch.compare(hidden[i], out)
                    hidden[i] = out
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
        watch = _Watch(self.model, self.structure, index, self.wanted)
        with watch, torch.enable_grad():
            for i, part in enumerate(self.slices):
                hidden = self._load(store, index, part).requires_grad_(True)
                out = run_block(block, hidden, self.call(part, index))
                watch.compare(hidden.detach(), out.detach())
                (gradients[i],) = torch.autograd.grad(out, hidden, gradients[i])
        return watch.moments()


class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """Hooks on the linears of one block that add to the statistics while it runs."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        index: int,
        wanted: _Wanted,
    ) -> None:
        self.model, self.index, self.statistics = model, index, wanted.statistics
        statistics = wanted.statistics
        self.groups = structure.of_block(index)
        self.inputs: dict[str, Moment] = {}
        self.mean_abs: dict[str, MeanAbs] = {}
        self.rows: dict[str, FirstRows] = {}
        self.gradients: dict[str, Moment] = {}
        self.fisher: dict[str, Fisher] = {}
        for group in self.groups:
            names, width = [m.name for m in group.members], group.members[0].in_features
            self.inputs |= dict.fromkeys(names, Moment(width))
            if "mean_abs" in statistics:
                self.mean_abs |= dict.fromkeys(names, MeanAbs(width))
            if "rows" in statistics:
                self.rows |= dict.fromkeys(names, FirstRows(wanted.keep_rows))
            for m in group.members:
                if "gradients" in statistics:
                    self.gradients[m.name] = Moment(m.out_features)
                if "fisher" in statistics:
                    self.fisher[m.name] = Fisher(m.out_features, m.in_features)
        self.cosine = MeanCosine()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        for group in self.groups:
            adders: list[Callable[[Tensor], None]] = [self.inputs[group.leader].add]
            for more in (self.mean_abs, self.rows):
                if group.leader in more:
                    adders.append(more[group.leader].add)

            def note(
                _m: Any, args: Any, _k: Any, adders: list[Callable[[Tensor], None]] = adders
            ) -> None:
                for add in adders:
                    add(args[0])

            leader = self.model.get_submodule(group.leader)
            hook = leader.register_forward_pre_hook(note, with_kwargs=True)
            self.stack.callback(hook.remove)
        if NEED_GRADIENTS & self.statistics:
            for group in self.groups:
                for member in group.members:
                    self._watch_output(member.name)
        return self

    def _watch_output(self, name: str) -> None:
        moment, fisher = self.gradients.get(name), self.fisher.get(name)

        def watch(_m: Any, args: Any, out: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                if moment is not None:
                    moment.add(gradient)
                if fisher is not None:
                    fisher.add(args[0], gradient)

            out.register_hook(add)  # type: ignore[no-untyped-call]

        hook = self.model.get_submodule(name).register_forward_hook(watch)
        self.stack.callback(hook.remove)

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def compare(self, hidden: Tensor, out: Tensor) -> None:
        """Note how alike the block's input and output are."""
        if "similarity" in self.statistics:
            self.cosine.add(hidden, out)

    def moments(self) -> BlockMoments:
        sums: dict[str, Moment | Fisher] = {**self.inputs, **self.gradients, **self.fisher}
        for name, summed in sums.items():
            if not torch.isfinite(summed.matrix).all():
                raise InputError(f"{name}: activations overflow on the calibration text")
        return BlockMoments(
            self.index,
            self.inputs,
            self.gradients,
            {name: found.value() for name, found in self.mean_abs.items()},
            {name: found.matrix for name, found in self.fisher.items()},
            {name: found.value() for name, found in self.rows.items()},
            self.cosine.value() if "similarity" in self.statistics else None,
        )
