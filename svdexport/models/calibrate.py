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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdexport.core.machine import keep_freed_memory
from svdexport.core.moments import (
    NEED_GRADIENTS,
    FirstRows,
    Fisher,
    MeanAbs,
    MeanCosine,
    Moment,
    Statistic,
)
from svdexport.core.precision import choose, in_full, products_in
from svdexport.core.ranks import ALONE, Ranks
from svdexport.errors import InputError
from svdexport.models.activations import Activations
from svdexport.models.blocks import Structure, record_inputs, run_block, tail_gradients
from svdexport.models.routed import Collected, borrow
from svdexport.models.weights import Weights, as_weights
from svdexport.recipe.values import Precision

Progress = Callable[[str, int, int], None]  # (what, done, total)
Labels = Literal["text", "sampled"]  # next tokens that a loss is taken for


@dataclass(frozen=True)
class BlockMoments:
    """Statistics of one block, by linear; empty where they were not asked for.

    Attributes:
        inputs: H; linears that share an input share it. gradients: G.
        sampled_gradients: G of the loss for tokens drawn from the model's own prediction.
        mean_abs: mean of |x| (n,), shared as H is.
        fisher: sum over samples of the squared gradient of the weight, (m, n); a sample is one
            sequence, and for an expert the tokens of a batch that are routed to it.
        rows: the first rows of the inputs, (keep_rows, n), shared as H is.
        similarity: mean cosine between the block's input and its output.
        few: tokens of the experts' linears that got too few for moments of their own.
    """

    block: int
    inputs: dict[str, Moment]
    gradients: dict[str, Moment]
    sampled_gradients: dict[str, Moment] = field(default_factory=dict)
    mean_abs: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    similarity: float | None = None
    few: dict[str, int] = field(default_factory=dict)


def calibrate(
    model: nn.Module | Weights,
    structure: Structure,
    tokens: Tensor,
    *,
    batch: int,
    statistics: Collection[Statistic],
    scratch: Path,
    keep_rows: int = 0,
    skip: Collection[int] = (),
    ranks: Ranks = ALONE,
    precision: Precision = "float32",
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[BlockMoments]:
    """Yield the statistics of every block; in order, or last to first where gradients are needed.

    A streamed model's block is in memory only while samples pass through it, not while the caller
    works on its statistics.

    Args:
        tokens: calibration samples, (samples, length), int64.
        batch: samples that run together.
        statistics: what to collect; the inputs' moments always are. Gradients are those of the
            summed next-token loss: for the text's tokens, and for ``sampled_gradients`` for
            tokens drawn from the model's prediction.
        scratch: folder for a file with the activations: 4 bytes x samples x length x width, and
            for gradients that x (blocks + 1), one for each boundary of blocks, or one more.
        keep_rows: input rows of each linear that the statistic ``rows`` keeps in memory.
        skip: blocks whose statistics are not wanted.
        ranks: processes that share the samples; all get the statistics over all samples.
        precision: of the blocks' products; what passes between blocks stays float32.
        seed: of the drawn tokens; each sample has a generator of its own.
    """
    keep_freed_memory()
    weights = as_weights(model)
    weights.model.eval().requires_grad_(False)
    blocks = [i for i in range(len(structure.blocks)) if i not in skip]
    if not blocks:
        return
    wanted = _Wanted(frozenset(statistics), keep_rows, blocks)
    sweep = _Sweep(
        weights,
        structure,
        tokens,
        batch,
        wanted,
        scratch / "activations.bin",
        ranks,
        choose(precision),
        seed,
    )
    backward = bool(NEED_GRADIENTS & wanted.statistics)
    try:
        yield from (sweep.backward if backward else sweep.forward)(progress)
    finally:
        sweep.store.close()


@dataclass(frozen=True)
class _Wanted:
    """What the hooks collect, and in which blocks (in order)."""

    statistics: frozenset[Statistic]
    keep_rows: int
    blocks: list[int]


class _Sweep:
    """The samples' way through the blocks of one model."""

    def __init__(
        self,
        weights: Weights,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        wanted: _Wanted,
        store: Path,
        ranks: Ranks,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.weights, self.structure, self.tokens = weights, structure, tokens
        self.wanted, self.ranks, self.dtype, self.seed = wanted, ranks, dtype, seed
        # whole batches are shared out, so that each one's rounding does not depend on the ranks
        starts = range(0, tokens.shape[0], batch)[ranks.rank :: ranks.size]
        self.slices = [slice(i, i + batch) for i in starts]
        self._calls: dict[int, Any] = {}  # by batch size: no sample is padded
        with weights.ends() as model:
            width = record_inputs(model, structure, tokens[:1]).hidden.shape[-1]
            self.store = Activations(store, tokens.shape[0], tokens.shape[1], width)
            for part in self.slices:
                recorded = record_inputs(model, structure, tokens[part])
                self._calls[recorded.hidden.shape[0]] = recorded.calls
                self.store.put(0, part, recorded.hidden)

    def call(self, part: slice, block: int) -> Any:
        """Further arguments of a block for one batch."""
        return self._calls[self.tokens[part].shape[0]][block]

    def hidden(self, boundary: int, part: slice) -> Tensor:
        return self.store.get(boundary, part, self.tokens[part].shape[0])

    def run(self, block: nn.Module, hidden: Tensor, part: slice, index: int) -> Tensor:
        """The block's output, float32; its matrix products in the sweep's own dtype."""
        with products_in(self.dtype):
            return run_block(block, hidden, self.call(part, index)).float()

    def forward(self, progress: Progress) -> Iterator[BlockMoments]:
        """Boundaries take each other's place in the file."""
        total = len(self.structure.blocks)
        for index, path in enumerate(self.structure.blocks[: self.wanted.blocks[-1] + 1]):
            watch = _Watch(self.weights.model, self.structure, index, self.wanted)
            with self.weights.block(path) as block, torch.no_grad(), contextlib.ExitStack() as s:
                if index in self.wanted.blocks:
                    s.enter_context(watch)
                for part in self.slices:
                    hidden = self.hidden(0, part)
                    watch.begin(part, hidden)
                    out = self.run(block, hidden, part, index)
                    watch.compare(hidden, out)
                    self.store.put(0, part, out)
            progress("calibrate", index + 1, total)
            if index in self.wanted.blocks:
                yield watch.moments(self.ranks)
            del watch  # before the next block's moments stand beside these

    def backward(self, progress: Progress) -> Iterator[BlockMoments]:
        """Boundary i is the input of block i; the last one turns from outputs to gradients.

        Gradients of drawn tokens, where they are asked for, have one boundary more.
        """
        total = len(self.structure.blocks)
        for index, path in enumerate(self.structure.blocks):
            with self.weights.block(path) as block, torch.no_grad():
                for part in self.slices:
                    out = self.run(block, self.hidden(index, part), part, index)
                    self.store.put(index + 1, part, out)
            progress("forward", index + 1, total)
        with self.weights.ends():
            for part in self.slices:
                for number, gradient in enumerate(self._tail(part)):
                    self.store.put(total + number, part, gradient)
        for index in reversed(range(self.wanted.blocks[0], total)):
            watch = _Watch(self.weights.model, self.structure, index, self.wanted)
            with contextlib.ExitStack() as stack:
                if index in self.wanted.blocks:
                    stack.enter_context(watch)
                self._backward_block(index, watch)
            progress("calibrate", total - index, total)
            if index in self.wanted.blocks:
                yield watch.moments(self.ranks)
            del watch  # before the next block's moments stand beside these

    def _tail(self, part: slice) -> list[Tensor]:
        """One sample at a time: the head's logits are the widest tensor of the model."""
        hidden, tokens = self.hidden(len(self.structure.blocks), part), self.tokens[part]
        found = []
        for i in range(tokens.shape[0]):
            sampler = None
            if "sampled_gradients" in self.wanted.statistics:  # one seed in any batch and rank
                sampler = torch.Generator().manual_seed((self.seed << 20) + part.start + i)
            one = slice(i, i + 1)
            found.append(
                tail_gradients(
                    self.weights.model, self.structure, tokens[one], hidden[one], sampler
                )
            )
        return [torch.cat(rows) for rows in zip(*found, strict=True)]

    def _backward_block(self, index: int, watch: _Watch) -> None:
        """The gradient at the block's output becomes that at its input, in the same place."""
        last = len(self.structure.blocks)
        with (
            self.weights.block(self.structure.blocks[index]) as block,
            torch.enable_grad(),
        ):
            for part in self.slices:
                hidden = self.hidden(index, part).requires_grad_(True)
                watch.begin(part, hidden)
                out = self.run(block, hidden, part, index)
                watch.compare(hidden.detach(), out.detach())
                for number, kind in enumerate(watch.labels):
                    watch.given = kind
                    (gradient,) = torch.autograd.grad(
                        out,
                        hidden,
                        self.hidden(last + number, part),
                        retain_graph=kind != watch.labels[-1],
                    )
                    self.store.put(last + number, part, gradient)


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
        sampled = "sampled_gradients" in statistics
        self.labels: tuple[Labels, ...] = ("text", "sampled") if sampled else ("text",)
        self.given: Labels = "text"  # whose gradient passes now
        self.samples = torch.Size()  # samples and tokens of the batch that passes now
        self.found = found = Collected()
        for group in self.groups:
            names, width = [m.name for m in group.members], group.members[0].in_features
            found.inputs |= dict.fromkeys(names, Moment(width))
            if "mean_abs" in statistics:
                found.mean_abs |= dict.fromkeys(names, MeanAbs(width))
            if "rows" in statistics:
                found.rows |= dict.fromkeys(names, FirstRows(wanted.keep_rows, width))
            for m in group.members:
                if "gradients" in statistics:
                    found.gradients[m.name] = Moment(m.out_features)
                if sampled:
                    found.sampled_gradients[m.name] = Moment(m.out_features)
                if "fisher" in statistics:
                    found.fisher[m.name] = Fisher(m.out_features, m.in_features)
        self.cosine = MeanCosine()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        for group in self.groups:
            adders: list[Callable[[Tensor], None]] = [self.found.inputs[group.leader].add]
            for more in (self.found.mean_abs, self.found.rows):
                if group.leader in more:
                    adders.append(more[group.leader].add)

            def note(
                _m: Any, args: Any, _k: Any, adders: list[Callable[[Tensor], None]] = adders
            ) -> None:
                with in_full():  # a product's sums in bfloat16 would drown small eigenvalues
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
        found, fisher = self.found, self.found.fisher.get(name)
        moments: dict[Labels, Moment | None] = {
            "text": found.gradients.get(name),
            "sampled": found.sampled_gradients.get(name),
        }

        def watch(_m: Any, args: Any, out: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                moment = moments[self.given]
                if moment is not None:
                    moment.add(gradient)
                if fisher is not None and self.given == "text":
                    fisher.add(*(_by_sample(rows, self.samples) for rows in (args[0], gradient)))

            out.register_hook(add)  # type: ignore[no-untyped-call]

        hook = self.model.get_submodule(name).register_forward_hook(watch)
        self.stack.callback(hook.remove)

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def begin(self, part: slice, hidden: Tensor) -> None:
        """Note which samples pass now; ``hidden`` is the block's input (samples, tokens, n)."""
        self.samples = hidden.shape[:2]
        for rows in self.found.rows.values():
            rows.sample = part.start

    def compare(self, hidden: Tensor, out: Tensor) -> None:
        """Note how alike the block's input and output are."""
        if "similarity" in self.statistics:
            self.cosine.add(hidden, out)

    def moments(self, ranks: Ranks) -> BlockMoments:
        found = self.found
        for one in (*found.all(), self.cosine):  # in the same order on all ranks
            one.share(ranks)
        few = borrow(self.groups, found)
        for sums in (found.inputs, found.gradients, found.sampled_gradients, found.fisher):
            for name, summed in sums.items():
                if not torch.isfinite(summed.matrix).all():
                    raise InputError(f"{name}: activations overflow on the calibration text")
        return BlockMoments(
            self.index,
            found.inputs,
            found.gradients,
            found.sampled_gradients,
            {name: one.value() for name, one in found.mean_abs.items()},
            {name: one.matrix for name, one in found.fisher.items()},
            {name: one.value() for name, one in found.rows.items()},
            self.cosine.value() if "similarity" in self.statistics else None,
            few,
        )


def _by_sample(rows: Tensor, samples: torch.Size) -> Tensor:
    """(samples, tokens, width) of what a linear is given, where a block flattens the first two.

    Rows that are only some of the batch's tokens (an expert's) count as one sample.
    """
    if rows.dim() != 2:
        return rows
    return rows.reshape(*samples, -1) if len(rows) == samples.numel() else rows[None]
