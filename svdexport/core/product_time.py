"""How long products take on this machine for one token, as a function of the rank."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLD_BYTES = 128 * 2**20  # more than a processor's cache: weights are read from memory every time
_ROUNDS = 3


@dataclass(frozen=True)
class ProductTime:
    """Seconds for one token of linears that share an input: dense, and as a pair of a rank."""

    dense: float
    fixed: float
    per_rank: float

    def at(self, rank: int | None) -> float:
        """At a rank; None is dense."""
        return self.dense if rank is None else self.fixed + self.per_rank * rank


def time_products(out_features: Sequence[int], in_features: int, high: int) -> ProductTime:
    """Time linears of shapes (m_i, n) dense, and with one A at ``high`` and a quarter of it.

    In float32: where a product waits for its weights, a type of fewer bits scales all times alike.
    """
    low = max(1, high // 4)
    dense = _seconds([(m, in_features) for m in out_features])
    pairs = [
        _seconds([(rank, in_features), *((m, rank) for m in out_features)]) for rank in (low, high)
    ]
    if high == low or pairs[1] <= pairs[0]:  # too small to tell: in proportion
        return ProductTime(dense, 0.0, pairs[1] / high)
    per_rank = (pairs[1] - pairs[0]) / (high - low)
    return ProductTime(dense, max(0.0, pairs[0] - per_rank * low), per_rank)


def _seconds(shapes: Sequence[tuple[int, int]]) -> float:
    """Of one product with each matrix: the best of some rounds over copies that fill no cache."""
    size = 4 * sum(rows * columns for rows, columns in shapes)
    copies = math.ceil(_COLD_BYTES / size)
    weights: list[Tensor] = []
    inputs = {columns: torch.ones(1, columns) for _, columns in shapes}
    for _ in range(min(copies, 2000)):
        weights += [torch.full(shape, 0.01) for shape in shapes]
    best = math.inf
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        best = min(best, time.perf_counter() - began)
    return best * len(shapes) / len(weights)
