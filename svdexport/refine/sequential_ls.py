"""Sequential least squares: every B is refitted to the original model's outputs, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.alternate import least_squares
from svdexport.recipe.refiners import SequentialLs
from svdexport.refine.base import Refined, RefineData, Refiner
from svdexport.refine.pairs import first, pair_tensors, second, set_pair

BATCH_TOKENS = 4096


@dataclass
class _Streams:
    """Inputs of the next block, batch by batch, in the original and in the compressed model."""

    original: list[Tensor]
    compressed: list[Tensor]


def refine(data: RefineData, config: SequentialLs) -> Refined:
    """B = argmin sum ||y - B A x^||^2 + ridge: y the output of the original linear on the original
    input, x^ the input that the linear has in the model compressed and refitted up to there.

    So each group makes up for what those before it have changed. Groups of a block are refitted in
    the order in which they run, since each changes the inputs of the next.
    """
    student, teacher = data.student, data.teacher()
    size = max(1, BATCH_TOKENS // data.tokens.shape[1])
    parts = torch.split(data.tokens, size)
    with torch.no_grad():
        streams = _Streams([teacher.embed(p) for p in parts], [student.embed(p) for p in parts])
        before = after = total = 0.0
        for index, path in enumerate(student.blocks):
            for leader in _in_order(data, index, path, streams):
                fit = _refit(data, teacher, index, leader, streams, config.ridge)
                before, after, total = before + fit[0], after + fit[1], total + fit[2]
            streams.original = [teacher.block(index, h) for h in streams.original]
            streams.compressed = [student.block(index, h) for h in streams.compressed]
            data.progress("sequential least squares", index + 1, len(student.blocks))
    note = (
        f"sequential_ls: squared error of the linears' outputs, as a share of the outputs', "
        f"{before / total:.4f} -> {after / total:.4f}"
        if total > 0
        else "sequential_ls: no pairs"
    )
    return Refined(pair_tensors(student.module, data.groups), (note,))


def _in_order(data: RefineData, index: int, path: str, streams: _Streams) -> list[str]:
    """The block's leaders in the order in which they run."""
    inside = [leader for leader in data.groups if leader.startswith(path + ".")]
    ran: list[str] = []
    module = data.student.module
    with ExitStack() as stack:
        for leader in inside:

            def note(_m: nn.Module, _a: Any, name: str = leader) -> None:
                ran.append(name)

            hook = module.get_submodule(leader).register_forward_pre_hook(note)
            stack.callback(hook.remove)
        data.student.block(index, streams.compressed[0])
    return list(dict.fromkeys(ran))


def _refit(
    data: RefineData, teacher: Any, index: int, leader: str, streams: _Streams, ridge: float
) -> tuple[float, float, float]:
    """Refit a group's B in place. Returns the squared error before and after, and that of 0."""
    module, members = data.student.module, data.groups[leader]
    a = first(module, leader)
    rank = a.shape[0]
    squares = torch.zeros((rank, rank), dtype=torch.float64)
    sizes = [second(module, name).shape[0] for name in members]
    targets = torch.zeros((sum(sizes), rank), dtype=torch.float64)
    power = 0.0
    for original, compressed in zip(streams.original, streams.compressed, strict=True):
        with _caught(teacher.module, members, outputs=True) as wanted:
            teacher.block(index, original)
        with _caught(module, [leader], outputs=False) as given:
            data.student.block(index, compressed)
        z = nn.functional.linear(given[leader], a)
        y = torch.cat([wanted[name] - _bias(module, name) for name in members], dim=1)
        squares += (z.T @ z).cpu().double()
        targets += (y.T @ z).cpu().double()
        power += float(y.double().pow(2).sum())
    old = torch.cat([second(module, name).cpu().double() for name in members])
    new = least_squares(old, targets, squares, ridge)
    set_pair(module, leader, members, a, new)

    def error(b: Tensor) -> float:
        return power - 2 * float((b * targets).sum()) + float(((b @ squares) * b).sum())

    return error(old), error(new), power


def _bias(module: nn.Module, name: str) -> Tensor | float:
    bias: Tensor | None = module.get_submodule(name).bias  # type: ignore[assignment]
    return 0.0 if bias is None else bias


@contextmanager
def _caught(module: nn.Module, names: list[str], outputs: bool) -> Iterator[dict[str, Tensor]]:
    """Inputs or outputs of the named linears, (rows, features), while the block runs."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def note(_m: nn.Module, args: Any, out: Tensor, key: str = name) -> None:
                tensor = out if outputs else args[0]
                found[key] = tensor.detach().reshape(-1, tensor.shape[-1])

            hook = module.get_submodule(name).register_forward_hook(note)
            stack.callback(hook.remove)
        yield found


REFINER = Refiner(
    "sequential_ls",
    "sequential least squares against the original outputs",
    "svdexport; closed form of the layer-wise correction that follows a compression",
    refine,
)
