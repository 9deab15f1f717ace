"""Alternating least squares for a pair in a two-sided metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alternated:
    """Factors a (k, n) and b (m, k), float64, and the loss before and after each iteration."""

    a: Tensor
    b: Tensor
    losses: tuple[float, ...]


def pair_loss(
    weight: Tensor, a: Tensor, b: Tensor, inputs: Tensor, gradients: Sequence[Tensor] | None = None
) -> float:
    """tr(G (W - B A) H (W - B A)^T), the squared error of the outputs in the metric G."""
    error = weight - b @ a
    return float(((_weighted(gradients, error) @ inputs) * error).sum())


def alternate(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    inputs: Tensor,
    gradients: Sequence[Tensor] | None = None,
    *,
    iterations: int,
) -> Alternated:
    """Minimise ||G^1/2 (W - B A) H^1/2||_F over A, then over B, in turn.

    Each step is the exact minimiser with the other factor held (AdaSVD's adaComp, Li et al., 2025,
    arXiv 2502.01403, which works on the calibration outputs: H = X X^T, G = I):

        A = (B^T G B)^+ B^T G W          B = W H A^T (A H A^T)^+

    so the loss never grows; a step that rounding makes worse is not taken.

    Args:
        weight: W (m, n), members of a group stacked. a: (k, n). b: (m, k). inputs: H (n, n).
        gradients: G_i (m_i, m_i) of the members, positive definite, or None for the identity.
            All in float64.
    """
    loss = pair_loss(weight, a, b, inputs, gradients)
    losses = [loss]
    for _ in range(iterations):
        weighted_b = _weighted(gradients, b)
        new_a = _solve(b.T @ weighted_b, weighted_b.T @ weight)
        new_b = _solve(new_a @ inputs @ new_a.T, new_a @ inputs @ weight.T).T
        new_loss = pair_loss(weight, new_a, new_b, inputs, gradients)
        if new_loss <= loss:
            a, b, loss = new_a, new_b, new_loss
        losses.append(loss)
    return Alternated(a.contiguous(), b.contiguous(), tuple(losses))


def least_squares(b: Tensor, targets: Tensor, squares: Tensor, ridge: float) -> Tensor:
    """B that minimises sum over rows of ||y - B z||^2 + ridge mean(z^2) rows ||B - B_0||_F^2.

    Args:
        b: B_0 (m, k), to be pulled towards. targets: sum of y z^T (m, k). squares: sum of
            z z^T (k, k). ridge: without unit. All in float64.
    """
    pull = ridge * squares.diagonal().mean() * torch.eye(squares.shape[0], dtype=squares.dtype)
    return b + _solve(squares + pull, (targets - b @ squares).T).T


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a symmetric positive semidefinite matrix; the pseudo-inverse where it is
    singular.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and float(factor.diagonal().min() / factor.diagonal().max()) > 1e-7:
        solved: Tensor = torch.cholesky_solve(right, factor)
        return solved
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right


def _weighted(gradients: Sequence[Tensor] | None, rows: Tensor) -> Tensor:
    """G rows for the block diagonal G of a group's members."""
    if gradients is None:
        return rows
    parts = torch.split(rows, [g.shape[0] for g in gradients])
    return torch.cat([g @ part for g, part in zip(gradients, parts, strict=True)])
