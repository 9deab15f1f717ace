"""The free gauge of a pair: (B R)(R^-1 A) = B A for any invertible R."""

from __future__ import annotations

import torch
from torch import Tensor


def balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with A A^T = B^T B = diag(sigma), sigma its singular values, descending.

    Truncations in a metric leave factors whose sizes differ by orders of magnitude; an optimiser
    that steps alike in every entry needs them alike.

    Args:
        a: (k, n). b: (m, k), members of a group stacked along m. k <= min(m, n).

    Returns: a and b of the same shapes and dtype; computed in float64.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, sigma, vt = torch.linalg.svd(rb @ ra.T)
    left = qb @ u
    largest = left.abs().argmax(dim=0)
    signs = torch.sign(left[largest, torch.arange(left.shape[1])])  # so that reruns agree
    root = sigma.sqrt() * signs
    new_a, new_b = root[:, None] * (vt @ qa.T), left * root
    return new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()
