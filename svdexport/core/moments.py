"""Second moments of activations and of output gradients, summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024  # rows per float32 product: keeps its rounding near 1e-6 of sqrt(H_ii H_jj)


class Moment:
    """H = sum over rows x of x x^T, shape (n, n), float64.

    Products of at most 1,024 rows run in the rows' own precision (float32), which is twice as fast
    as float64; their sum is kept in float64, so the error does not grow with the number of rows.
    """

    def __init__(self, size: int) -> None:
        self.matrix = torch.zeros((size, size), dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows: x of shape (..., n)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        for chunk in torch.split(rows, _CHUNK):
            self.matrix += chunk.T @ chunk
        self.rows += rows.shape[0]
