"""Truncation of a matrix's singular values by a smooth mask, with a gradient that stays finite.

Dobi-SVD, Wang et al., ICLR 2025, arXiv 2502.02723: the mask is 0.5 tanh(beta (k - i)) + 0.5 over
the positions i = 1, 2, ..., and k is learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CLOSE = 1e-10  # squared singular values nearer than this share of the largest count as equal
_TERMS = 10  # of the geometric series that takes the place of 1 / (1 - q^2)
_BOTH_ZERO = 100.0  # where both values are at the floor


def mask(position: Tensor, count: int, beta: float) -> Tensor:
    """Weights (count,) of the singular values for a truncation at ``position`` (a scalar)."""
    numbers = torch.arange(1, count + 1, dtype=position.dtype)
    weights: Tensor = 0.5 * torch.tanh(beta * (position - numbers)) + 0.5
    return weights


def stable_reciprocals(squares: Tensor) -> Tensor:
    """1 / (s_i^2 - s_j^2) for descending s^2 (r,), antisymmetric, finite where values meet.

    Values are taken relative to the largest. Where two differ by at most 1e-10, 1 / (1 - q^2),
    q = s_j / s_i, is replaced by the first 11 terms of its series, (1 - q^22) / (1 - q^2), which
    is 11 where they are equal; where both are zero the entry is 100.
    """
    scale = float(squares[0]) if float(squares[0]) > 0.0 else 1.0
    values = (squares / scale).clamp_min(0.0)
    larger = torch.maximum(values[:, None], values[None, :])
    smaller = torch.minimum(values[:, None], values[None, :])
    difference = larger - smaller
    close = difference <= _CLOSE
    q2 = smaller / larger.clamp_min(1e-300)
    series = torch.stack([q2**power for power in range(_TERMS + 1)]).sum(dim=0)
    near = torch.where(larger <= _CLOSE, _BOTH_ZERO, series / larger.clamp_min(_CLOSE))
    found = torch.where(close, near, 1.0 / difference.clamp_min(_CLOSE))
    upper = torch.triu(found, diagonal=1)
    return (upper - upper.T) / scale


class _SoftTruncation(torch.autograd.Function):
    """Y -> U diag(t) U^T Y with U the left singular vectors of Y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(y @ y.T)
        squares, u = values.flip(0).clamp_min(0.0), vectors.flip(1)
        ctx.save_for_backward(y, weights, squares, u)
        cut: Tensor = u @ (weights[:, None] * (u.T @ y))
        return cut

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """With P = U t U^T and M = Y Y^T: dP = U (K o (U^T dM U)) U^T, where
        K_ij = (t_i - t_j) / (s_i^2 - s_j^2); the mask moves with the positions, not the values.
        """
        (g,) = gradients
        y, t, squares, u = ctx.saved_tensors
        product = u.T @ g @ (y.T @ u)
        k = (t[:, None] - t[None, :]) * stable_reciprocals(squares)
        inner = u @ (k * (product + product.T) / 2) @ u.T
        return u @ (t[:, None] * (u.T @ g)) + 2 * inner @ y, product.diagonal()


def soft_truncate(y: Tensor, position: Tensor, beta: float) -> Tensor:
    """Y (rows, features) with its singular values times the mask at ``position``; float64 inside.

    Differentiable in both; one symmetric eigenproblem of the smaller side.
    """
    wide = y.double() if y.shape[0] <= y.shape[1] else y.double().T
    weights = mask(position.double(), wide.shape[0], beta)
    found: Tensor = _SoftTruncation.apply(wide, weights)  # type: ignore[no-untyped-call]
    return (found if y.shape[0] <= y.shape[1] else found.T).to(y.dtype)
