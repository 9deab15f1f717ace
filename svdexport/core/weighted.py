"""Low-rank approximation with a weight for every element, by alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from svdexport.core.lowrank import FactorPair

# Elements that no calibration sample moved still get this share of the mean weight, so that every
# row's problem has one solution.
_FLOOR = 1e-4


def weighted_pair(
    weight: Tensor, importance: Tensor, start: FactorPair, iterations: int, steps: int
) -> FactorPair:
    """Lower sum_ij F_ij (W - B A)_ij^2 from ``start``, one factor at a time.

    Each half is a weighted least-squares problem a row (Srebro and Jaakkola, 2003), solved by
    ``steps`` steps of conjugate gradients for all rows at once; k steps and more solve it exactly.
    Before each half the fixed factor is made orthonormal in the mean weights, in which most
    of F lies, so that few steps go far. The weighted error never grows.

    Args:
        weight: W (m, n). importance: F (m, n), not negative.
    """
    w = weight.double()
    f = importance.double()
    mean = float(f.mean())
    f = f / mean + _FLOOR if mean > 0.0 else torch.ones_like(w)
    a, b = start.a.double(), start.b.double()
    for _ in range(iterations):
        a, b = _orthonormal(a, b, f.mean(dim=0))
        b = _least_squares(w, f, a, b, steps)
        bt, at = _orthonormal(b.T, a.T, f.mean(dim=1))
        a = _least_squares(w.T, f.T, bt, at, steps).T
        b = bt.T
    return FactorPair(a.float().contiguous(), b.float().contiguous())


def _orthonormal(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same B A with A diag(weights) A^T = I."""
    root = weights.sqrt()
    q, r = torch.linalg.qr((a * root).T)
    return (q / root[:, None]).T, b @ r.T


def _least_squares(w: Tensor, f: Tensor, a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Rows b_i nearer to argmin sum_j F_ij (W_ij - b_i A_j)^2, A fixed, from the given ones."""
    residual = (f * (w - b @ a)) @ a.T
    direction = residual.clone()
    squared = residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        applied = (f * (direction @ a)) @ a.T
        curvature = (direction * applied).sum(dim=1, keepdim=True)
        length = torch.where(curvature > 0, squared / curvature.clamp_min(1e-300), 0.0)
        b = b + length * direction
        residual = residual - length * applied
        new = residual.square().sum(dim=1, keepdim=True)
        direction = residual + new / squared.clamp_min(1e-300) * direction
        squared = new
    return b
