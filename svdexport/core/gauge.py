"""The free gauge of a pair: (B R)(R^-1 A) = B A for any invertible R.

Pairs are made and written in one that costs least where they are quantised, or where a runtime
rounds A x: every component scaled evenly, then components mixed by Hadamard matrices, so that all
blocks hold as much and no component stands out (docs/quantisation.md has the measured gains).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition


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


def even_scales(b: Tensor, squares: Tensor) -> Tensor:
    """d (k,), float64: with A's rows times d and B's columns over d both carry as much.

    A block of b_j = ||B_j|| and z_j = rms (A x)_j that share a scale gets a rounding error of B's
    values in proportion to sum_j b_j^2 sum_j z_j^2, and so does one of the activations' (a runtime
    that multiplies in integers rounds A x to 8 bits, in blocks of up to 256 components). A's own
    error is the same for every d: its blocks lie within rows. With b_j / d_j and z_j d_j the
    product of sums is least, by Cauchy and Schwarz, where d_j^2 = b_j / z_j, and then it is
    (sum_j b_j z_j)^2.

    Args:
        b: (m, k). squares: mean squares of A x, (k,). A component without a signal or without an
            effect keeps its scale.
    """
    sizes, rms = b.double().norm(dim=0), squares.double().clamp_min(0).sqrt()
    usable = (sizes > 0) & (rms > 0) & torch.isfinite(sizes / rms) & torch.isfinite(rms / sizes)
    one = torch.ones_like(sizes)
    return torch.where(
        usable, torch.where(usable, sizes, one) / torch.where(usable, rms, one), one
    ).sqrt()


def evened(a: Tensor, b: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k) in the gauge of :func:`even_scales`; the same product."""
    d = even_scales(b, squares)
    new_a, new_b = a.double() * d[:, None], b.double() / d
    return new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()


def in_even_gauge(found: Decomposition, moment: Tensor | None) -> Decomposition:
    """Nested factors in the gauge of :func:`even_scales`, with H (n, n) of the inputs, or H = I.

    The scale of a component depends on nothing but its own row and column: it is right at every
    rank, and the factors stay nested. :func:`mixed` comes once the rank is chosen.
    """
    a = found.a.double()
    squares = ((a if moment is None else a @ moment.double()) * a).sum(dim=1)
    return with_even_scales(found, squares)[0]


def with_even_scales(found: Decomposition, squares: Tensor) -> tuple[Decomposition, Tensor]:
    """The same from the sums of squares of A x, (k,), where they are known; and theirs after it."""
    scales = even_scales(found.b, squares)
    first, second = evened(found.a, found.b, squares)
    return dataclasses.replace(found, a=first, b=second), squares * scales.square()


MIXED_AT_MOST = 256  # components: the largest block that shares a scale, in weights and in A x


def mixed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k) with their components mixed; the same product.

    With p the largest power of two, up to 256, that divides k, every p components k / p apart
    become neighbours, times a Hadamard matrix over sqrt(p): where they were sorted by size, all
    blocks then hold as much, and within a block nothing stands out. Of the gauges with equal scales
    it has the least product of sums (see :func:`even_scales`) that blocks of p allow.
    """
    turn = hadamard(_mixed_together(a.shape[0]))
    first = _apart(a.double(), len(turn))
    first = torch.einsum("ij,qjn->qin", turn, first).reshape(a.shape)
    second = _apart(b.double().T, len(turn))
    second = torch.einsum("ij,qjm->qim", turn, second).reshape(b.shape[::-1]).T
    return first.to(a.dtype).contiguous(), second.to(b.dtype).contiguous()


def mixed_squares(squares: Tensor) -> Tensor:
    """Mean squares of A x (k,) after :func:`mixed`, for components without correlations."""
    size = _mixed_together(len(squares))
    means = squares.reshape(size, -1).mean(dim=0)
    return means.repeat_interleave(size)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, over sqrt(size): orthogonal, symmetric; float64."""
    turn = torch.ones((1, 1), dtype=torch.float64)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn / math.sqrt(size)


def _mixed_together(rank: int) -> int:
    return min(rank & -rank, MIXED_AT_MOST)


def _apart(rows: Tensor, size: int) -> Tensor:
    """(k, n) as (k / size, size, n): rows that are k / size apart together."""
    return rows.reshape(size, -1, rows.shape[1]).transpose(0, 1)
