"""What a linear layer should be when the layers before it have changed."""

from __future__ import annotations

import torch
from torch import Tensor

from svdexport.core.decompose import damped_cholesky
from svdexport.core.moments import CrossMoments

RIDGE = 1e-4  # of the metric's mean eigenvalue


def sequence_target(weight: Tensor, moments: CrossMoments, mix: float) -> tuple[Tensor, Tensor]:
    """The weight W' that takes the compressed model's inputs to the original outputs; its metric.

    Minimises ||W X - W' X^||^2 + mix ||W X - W' X||^2 over W': with X alone W' would be W, with X^
    alone it would follow the noise of few tokens. So W' = W C M^-1 with C = X X^^T + mix X X^T and
    the metric M = X^ X^^T + mix X X^T, in which the best rank-k pair of W' is then the best for
    the whole sum. M gets a ridge of 1e-4 of its mean eigenvalue, which pulls towards W.

    Args:
        weight: W (m, n), the members of a group stacked. mix: 0 or more.

    Returns: W' (m, n) and M (n, n), float64.
    """
    metric = moments.compressed + mix * moments.original
    cross = moments.cross + mix * moments.original
    ridge = RIDGE * metric.diagonal().mean() * torch.eye(len(metric), dtype=torch.float64)
    factor, _ = damped_cholesky(metric + ridge, 0.0)
    target = torch.cholesky_solve((weight.double() @ (cross + ridge)).T, factor).T
    return target.contiguous(), metric
