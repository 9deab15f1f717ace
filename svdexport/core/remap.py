"""Dobi-SVD's remapping: a pair of rank k in k max(m, n) slots of 16 bits.

The first min(m, n) entries of a component's two vectors share slots, 8 bits each with one scale per
vector; the rest of the longer vector has 16 bits (Wang et al., ICLR 2025, arXiv 2502.02723). The
kept share of a linear is then k / min(m, n): every rank from 1 to min(m, n) has its own size, and
none below the full one is larger than the dense matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_SLOTS = 4  # two float32 scales, bit by bit, at the end of a component's row
CODES = 127


def slots_per_rank(out_features: int, in_features: int) -> int:
    """16-bit slots of one component, without its two scales."""
    return max(out_features, in_features)


def bytes_per_rank(out_features: int, in_features: int) -> int:
    """Bytes of one component with its two scales."""
    return 2 * (slots_per_rank(out_features, in_features) + SCALE_SLOTS)


def rank_in(size: int, out_features: int, in_features: int) -> int:
    """The largest rank whose slots and scales take at most ``size`` bytes; 0 where none does."""
    each = bytes_per_rank(out_features, in_features)
    return min(size // each, out_features, in_features)


def remap(a: Tensor, b: Tensor) -> Tensor:
    """Slots int16 (k, max(m, n) + 4) of A (k, n) and B (m, k), members stacked along m.

    Of a slot that holds two codes the low byte is the longer vector's. The tail of the longer
    vector is stored in float16, divided by the vector's largest magnitude. Raises ValueError where
    a value is not finite.
    """
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("a factor with NaN or infinite values cannot be remapped")
    first, second = a.float(), b.float().T
    long, short = (second, first) if second.shape[1] >= first.shape[1] else (first, second)
    shared = short.shape[1]
    sizes = [_sizes(vectors) for vectors in (long, short)]
    low = _codes(long[:, :shared], sizes[0])
    high = _codes(short, sizes[1])
    pairs = (high.to(torch.int16) << 8) | (low.to(torch.int16) & 255)
    tail = (long[:, shared:] / sizes[0]).to(torch.float16).view(torch.int16)
    scales = torch.cat(sizes, dim=1).contiguous().view(torch.int16)
    return torch.cat([pairs, tail, scales], dim=1).contiguous()


def restore(slots: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k), float32, exactly as the slots hold them.

    Raises ValueError where the slots are of another shape.
    """
    shared = min(out_features, in_features)
    expected = slots_per_rank(out_features, in_features) + SCALE_SLOTS
    if slots.ndim != 2 or slots.shape[1] != expected or slots.dtype != torch.int16:
        raise ValueError(
            f"slots {tuple(slots.shape)} {slots.dtype}, expected (k, {expected}) int16"
        )
    pairs, tail, packed = torch.split(
        slots, [shared, expected - SCALE_SLOTS - shared, SCALE_SLOTS], dim=1
    )
    sizes = packed.contiguous().view(torch.float32)
    low = ((pairs & 255) ^ 128) - 128  # the low byte with its sign
    head = low.float() * (sizes[:, :1] / CODES)
    rest = tail.contiguous().view(torch.float16).float() * sizes[:, :1]
    long = torch.cat([head, rest], dim=1)
    short = (pairs >> 8).float() * (sizes[:, 1:] / CODES)
    first, second = (short, long) if out_features >= in_features else (long, short)
    return first.contiguous(), second.T.contiguous()


def _sizes(vectors: Tensor) -> Tensor:
    """Largest magnitude of each row, (k, 1); 1 where all is 0."""
    sizes = vectors.abs().amax(dim=1, keepdim=True)
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _codes(vectors: Tensor, sizes: Tensor) -> Tensor:
    return (vectors / sizes * CODES).round().clamp(-CODES, CODES).to(torch.int8)
