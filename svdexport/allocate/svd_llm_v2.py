"""SVD-LLM V2's ratios: inside each type of matrix, more is removed where it costs less."""

from __future__ import annotations

import math
from collections.abc import Sequence

from svdexport.allocate.base import Allocation, Candidate, by_ratios
from svdexport.core.lowrank import round_rank
from svdexport.recipe.settings import Settings


def allocate(
    candidates: Sequence[Candidate], param_ratio: float, multiple: int, settings: Settings
) -> dict[str, Allocation]:
    """Removed share of a matrix: R n (1 / log L_i) / sum over its type of 1 / log L_j.

    L is the truncation loss ||(W - B A) X||_F at the overall removed share R = 1 - param_ratio,
    and n the number of matrices of the type. Where losses are so small that a logarithm would not
    be positive, all of the type are scaled so that the smallest logarithm is 1.
    """
    types: dict[str, list[Candidate]] = {}
    for item in candidates:
        types.setdefault(item.kind, []).append(item)
    kept: dict[str, float] = {}
    for members in types.values():
        logs = [_log_loss(item, param_ratio, multiple) for item in members]
        if min(logs) < 1.0:
            logs = [value - min(logs) + 1.0 for value in logs]
        total = sum(1.0 / value for value in logs)
        for item, value in zip(members, logs, strict=True):
            removed = (1.0 - param_ratio) * len(members) / value / total
            kept[item.name] = min(1.0, max(0.0, 1.0 - removed))
    return by_ratios(candidates, kept, param_ratio, multiple)


def _log_loss(item: Candidate, param_ratio: float, multiple: int) -> float:
    if item.energies is None:
        raise ValueError(f"{item.name}: this allocation needs the group's energies")
    wanted = param_ratio * item.dense_params / item.rank_params
    loss = math.sqrt(max(0.0, float(item.energies[round_rank(wanted, multiple) :].sum())))
    return math.log(max(loss, 1e-12))
