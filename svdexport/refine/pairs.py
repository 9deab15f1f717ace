"""The pairs of a loaded student: their parameters, their gauge, their first products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.gauge import balance


def first(module: nn.Module, leader: str) -> nn.Parameter:
    """A of a group, (k, n)."""
    weight: nn.Parameter = module.get_submodule(f"{leader}.lr_a").weight  # type: ignore[assignment]
    return weight


def second(module: nn.Module, linear: str) -> nn.Parameter:
    """B of a linear, (m, k)."""
    weight: nn.Parameter = module.get_submodule(f"{linear}.lr_b").weight  # type: ignore[assignment]
    return weight


@torch.no_grad()
def balance_pairs(module: nn.Module, groups: dict[str, list[str]]) -> None:
    """Bring every pair into the balanced gauge; what the model computes stays."""
    for leader, members in groups.items():
        a, parts = first(module, leader), [second(module, name) for name in members]
        if a.shape[0] > min(a.shape[1], sum(part.shape[0] for part in parts)):
            continue  # a rank beyond the matrix's own has no such gauge
        set_pair(module, leader, members, *balance(a, torch.cat(list(parts))))


@torch.no_grad()
def set_pair(module: nn.Module, leader: str, members: list[str], a: Tensor, b: Tensor) -> None:
    """Put A (k, n) and the members' stacked B (m, k) in the place of a group's own."""
    first(module, leader).copy_(a)
    parts = [second(module, name) for name in members]
    for part, rows in zip(parts, torch.split(b, [p.shape[0] for p in parts]), strict=True):
        part.copy_(rows)


def pair_parameters(module: nn.Module, groups: dict[str, list[str]]) -> dict[str, nn.Parameter]:
    """A and B of every pair, by the checkpoint's tensor names."""
    found: dict[str, nn.Parameter] = {}
    for leader, members in groups.items():
        found[f"{leader}.lr_a.weight"] = first(module, leader)
        found |= {f"{name}.lr_b.weight": second(module, name) for name in members}
    return found


def pair_tensors(module: nn.Module, groups: dict[str, list[str]]) -> dict[str, Tensor]:
    """The checkpoint's factor tensors as they are now, float32 on the CPU."""
    parameters = pair_parameters(module, groups)
    return {name: weight.detach().float().cpu().clone() for name, weight in parameters.items()}


@contextlib.contextmanager
def shared_products(module: nn.Module, groups: dict[str, list[str]]) -> Iterator[None]:
    """Compute A x once a group instead of once a member, while the block lasts."""
    changed: list[nn.Module] = []
    for members in groups.values():
        if len(members) < 2:
            continue
        kept: list[Any] = []  # the input of the running group, A x, and how many have used it
        for name in members:
            linear = module.get_submodule(name)
            linear.forward = _forward(linear, kept, len(members))  # type: ignore[method-assign]
            changed.append(linear)
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward


def _forward(linear: Any, kept: list[Any], users: int) -> Any:
    def forward(x: Tensor) -> Tensor:
        if not kept or kept[0] is not x:
            kept[:] = [x, linear.first_factor(x), 0]
        y: Tensor = linear.lr_b(kept[1])
        kept[2] += 1
        if kept[2] == users:
            kept.clear()
        return y if linear.bias is None else y + linear.bias

    return forward
