"""What all quantisation grids share: steps within small groups of columns.

Every grid that is written to a file gives a weight the value ``(code - zero) * scale - minimum``,
in float32 and in this order of operations, with one (scale, minimum, zero) for each row and group
of ``size`` neighbouring columns; a grid of uneven steps has a table of levels in place of
``code - zero``, and no minimum. What a format stores to get there (half-precision scales of
super-blocks, 4- or 6-bit scales of their parts, packed zero points) is its own affair: ``Scales``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Scales = dict[str, Tensor]
"""Stored parameters by name, each (rows, blocks, ...)."""


@dataclass(frozen=True)
class Steps:
    """Effective parameters of a quantised matrix.

    Attributes:
        scale, minimum, zero: float32 (rows, groups).
        size: columns of a group.
        low, high: smallest and largest code.
        levels: float32, rising, of the codes from 0 where steps are uneven; zero and minimum are
            not used then.
    """

    scale: Tensor
    minimum: Tensor
    zero: Tensor
    size: int
    low: int
    high: int
    levels: Tensor | None = None

    def codes(self, values: Tensor) -> Tensor:
        """Nearest codes, uint8 (rows, n), of values (rows, n)."""
        grouped = values.reshape(values.shape[0], -1, self.size)
        if self.levels is not None:
            found = nearest_level(grouped * self.inverse()[..., None], self.levels)
            return found.to(torch.uint8).reshape(values.shape)
        code = torch.round((grouped + self.minimum[..., None]) * self.inverse()[..., None])
        code = (code + self.zero[..., None]).clamp_(self.low, self.high)
        return code.to(torch.uint8).reshape(values.shape)

    def values(self, codes: Tensor) -> Tensor:
        """Float32 values (rows, n) of codes (rows, n): what a runtime computes with."""
        grouped = codes.reshape(codes.shape[0], -1, self.size)
        if self.levels is not None:
            return (self.levels[grouped.long()] * self.scale[..., None]).reshape(codes.shape)
        value = (grouped.float() - self.zero[..., None]) * self.scale[..., None]
        return (value - self.minimum[..., None]).reshape(codes.shape)

    def inverse(self) -> Tensor:
        """1 / scale, and 0 where the scale is 0 (or so small that its inverse overflows)."""
        inverse = 1.0 / self.scale
        return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


class Grid(Protocol):
    """A storage format as the quantisers see it."""

    @property
    def block(self) -> int:
        """Columns whose parameters are stored together."""

    def search(self, values: Tensor, weights: Tensor) -> Scales:
        """Parameters of small weighted squared error for values (rows, blocks * block).

        ``weights`` (blocks * block,) are at least 0 and belong to the columns.
        """

    def steps(self, scales: Scales) -> Steps:
        """The effective parameters."""


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index, int64, of the level that is nearest to each value; levels (count,) rise."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values.contiguous(), middles.to(values.dtype))


def joined(parts: Sequence[Scales]) -> Scales:
    """Parameters of neighbouring column ranges as those of the whole."""
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def check_finite(values: Tensor) -> None:
    """Raise ValueError for NaN and infinities, which no grid holds."""
    if not torch.isfinite(values).all():
        raise ValueError("a weight with NaN or infinite values cannot be quantised")
