"""Loading pairs that are stored in Dobi-SVD's remapped layout (svdexport.core.remap)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from svdexport.checkpoint import PairSpec, restored_group
from svdexport.core.remap import SCALE_SLOTS, slots_per_rank
from svdexport.models.modules import LowRankLinear


class _Slots(nn.Module):
    """What stands for a group's factors until its slots are read."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        empty = torch.empty((rank, width), dtype=torch.int16)
        self.weight = nn.Parameter(empty, requires_grad=False)


def slots_for_factors(model: nn.Module, pairs: Mapping[str, PairSpec]) -> None:
    """Take the (uninitialised) factors away, so that the slots are what is loaded."""
    rows: dict[str, int] = {}
    for name, spec in pairs.items():
        module = _pair(model, name)
        rows[spec.group] = rows.get(spec.group, 0) + module.out_features
        del module.lr_b
    for leader, count in rows.items():
        module = _pair(model, leader)
        device = module.lr_a.weight.device
        del module.lr_a
        with torch.device(device):
            width = slots_per_rank(count, module.in_features) + SCALE_SLOTS
            module.lr_slots = _Slots(module.rank, width)


def factors_for_slots(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Put the factors that the slots hold back in place, in the model's dtype."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(_leader(model, name), []).append(name)
    dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.float32
    for leader, members in groups.items():
        module = _pair(model, leader)
        slots = module.lr_slots.weight.detach()  # type: ignore[union-attr, operator]
        sizes = {member: shapes[member] for member in members}
        found = restored_group(slots.cpu(), leader, sizes)
        del module.lr_slots
        for name, tensor in found.items():
            path, _, factor = name.removesuffix(".weight").rpartition(".")
            rank_out, rank_in = tensor.shape
            linear = nn.Linear(rank_in, rank_out, bias=False, device="meta")
            values = tensor.to(device=slots.device, dtype=dtype)
            linear.weight = nn.Parameter(values, requires_grad=False)
            setattr(_pair(model, path), factor, linear)


def _leader(model: nn.Module, name: str) -> str:
    """Name of the linear whose A a member uses."""
    leader = _pair(model, name)._leader[0]
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[leader]


def _pair(model: nn.Module, name: str) -> LowRankLinear:
    module = model.get_submodule(name)
    if not isinstance(module, LowRankLinear):
        raise ValueError(f"{name} is not a pair")
    return module
