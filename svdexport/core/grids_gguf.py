"""GGUF's quantisation grids: scales by search or as given, rounding, bytes and back.

Bytes are those of ggml's blocks, so ``gguf.dequantize`` and llama.cpp read exactly the values that
:meth:`svdexport.core.grids.Steps.values` gives. ``Q5_0`` and ``Q5_1`` are here since llama.cpp
falls back to them where a row is no whole number of 256-element blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from svdexport.core.grids import Scales, Steps, check_finite
from svdexport.core.grids_gguf_bytes import LAYOUTS
from svdexport.core.grids_search import (
    affine_scale,
    level_scale,
    rounding_error,
    symmetric_scale,
)

HALF_MAX = 65504.0
_ROWS_AT_ONCE = 1 << 21  # elements of scratch memory in one step of a search


@dataclass(frozen=True)
class GgufGrid:
    """One ggml type.

    Attributes:
        name: as ggml calls it.
        block: columns that are stored together. size: columns that share a scale.
        low, high, zero: range of codes and the code that stands for 0.
        affine: the type stores a minimum too.
        scale_range: smallest and largest stored scale of a part of a block; None where the block
            has one half-precision scale and no parts.
        levels: what the codes stand for where steps are uneven, in units of the scale.
    """

    name: str
    block: int
    size: int
    low: int
    high: int
    zero: int = 0
    affine: bool = False
    scale_range: tuple[int, int] | None = None
    levels: tuple[float, ...] | None = None

    @property
    def parts(self) -> int:
        return self.block // self.size

    def search(self, values: Tensor, weights: Tensor) -> Scales:
        """Parameters of small weighted squared error for values (rows, blocks * block).

        Args:
            values: float32. weights: (blocks * block,), of the columns, at least 0.

        Raises:
            ValueError: a value is not finite, or past what a half-precision scale reaches.
        """
        check_finite(values)
        rows, columns = values.shape
        shape = (-1, columns // self.block, self.parts, self.size)
        weight = weights.float().reshape(1, *shape[1:])
        step = max(1, _ROWS_AT_ONCE // columns)
        found = [
            self._search_rows(values[at : at + step].float().reshape(shape), weight)
            for at in range(0, rows, step)
        ]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _search_rows(self, values: Tensor, weights: Tensor) -> Scales:
        if self.affine:
            scale, minimum = affine_scale(values, weights, self.high)
            if self.scale_range is None:
                return {"d": _half(scale[..., 0]), "dmin": _half(-minimum[..., 0])}
            return self._affine_parts(values, weights, scale, minimum)
        if self.levels is not None:
            scale = level_scale(values, weights, torch.tensor(self.levels))
            return {"d": _half(scale[..., 0])}
        scale = symmetric_scale(values, weights, self.low - self.zero, self.high - self.zero)
        if self.scale_range is None:
            return {"d": _half(scale[..., 0])}
        return self._symmetric_parts(values, weights, scale)

    def _symmetric_parts(self, values: Tensor, weights: Tensor, scale: Tensor) -> Scales:
        """Q3_K, Q6_K: one d a block, signed integer scales of its parts."""
        low, high = self.scale_range or (0, 0)
        peak = scale.gather(-1, scale.abs().argmax(dim=-1, keepdim=True))[..., 0]
        best = _Best()
        for factor in (1.0, 0.92) if high < 100 else (1.0,):
            d = _half(peak / low * factor)
            stored = (scale * _inverse(d)[..., None]).round().clamp(low, high)
            self._offer(best, values, weights, {"d": d, "scale": stored})
        self._offer_neighbours(best, values, weights, low, high)
        self._offer_refit(best, values, weights)
        return best.stored(torch.int8)

    def _affine_parts(
        self, values: Tensor, weights: Tensor, scale: Tensor, minimum: Tensor
    ) -> Scales:
        """Q2_K, Q4_K, Q5_K: d and dmin a block, unsigned integer scales and minima of its parts."""
        low, high = self.scale_range or (0, 0)
        best = _Best()
        factors = (1.0, 0.9, 0.8) if high < 16 else (1.0,)
        for one, two in itertools.product(factors, factors):
            d = _half(scale.amax(dim=-1) / high * one)
            dmin = _half(minimum.amax(dim=-1) / high * two)
            stored = (scale * _inverse(d)[..., None]).round().clamp(low, high)
            offset = (minimum * _inverse(dmin)[..., None]).round().clamp(low, high)
            made = {"d": d, "dmin": dmin, "scale": stored, "minimum": offset}
            self._offer(best, values, weights, made)
        self._offer_neighbours(best, values, weights, low, high)
        self._offer_refit(best, values, weights)
        return best.stored(torch.uint8)

    def _error(self, values: Tensor, weights: Tensor, scales: Scales) -> Tensor:
        """Of each part: (rows, blocks, parts)."""
        steps = self.steps(scales)
        shape = values.shape[:-1]
        scale, minimum = steps.scale.reshape(shape), steps.minimum.reshape(shape)
        low, high = self.low - self.zero, self.high - self.zero
        return rounding_error(values, weights, scale, minimum, low, high)

    def _offer(self, best: _Best, values: Tensor, weights: Tensor, scales: Scales) -> None:
        best.offer_blocks(scales, self._error(values, weights, scales))

    def _offer_neighbours(
        self, best: _Best, values: Tensor, weights: Tensor, low: int, high: int
    ) -> None:
        """Stored scales (and minima) one step away, each part by itself."""
        start = dict(best.scales)
        shifts = (-1, 0, 1)
        for one, two in itertools.product(shifts, shifts if self.affine else (0,)):
            if one == two == 0:
                continue
            moved = {**start, "scale": (start["scale"] + one).clamp(low, high)}
            if self.affine:
                moved["minimum"] = (start["minimum"] + two).clamp(low, high)
            best.offer_parts(moved, self._error(values, weights, moved))

    def _offer_refit(self, best: _Best, values: Tensor, weights: Tensor) -> None:
        """d (and dmin) by least squares for the codes and stored scales found so far."""
        scales = best.scales
        rows = values.shape[0]
        codes = self.steps(scales).codes(values.reshape(rows, -1)).reshape(values.shape).float()
        slope = (codes - self.zero) * scales["scale"][..., None]
        axes = (-2, -1)
        aa, av = (weights * slope * slope).sum(axes), (weights * slope * values).sum(axes)
        if not self.affine:
            d = torch.where(aa > 0, av / aa.clamp_min(1e-38), torch.zeros_like(aa))
            self._offer(best, values, weights, {**scales, "d": _half(d)})
            return
        offset = -scales["minimum"][..., None].expand_as(values)
        ab, bv = (weights * slope * offset).sum(axes), (weights * offset * values).sum(axes)
        bb = (weights * offset * offset).sum(axes)
        det = aa * bb - ab * ab
        usable = det > 1e-9 * aa * bb
        safe = torch.where(usable, det, torch.ones_like(det))
        d, dmin = (av * bb - bv * ab) / safe, (aa * bv - ab * av) / safe
        usable &= (d > 0) & (dmin >= 0) & (d < HALF_MAX) & (dmin < HALF_MAX)
        d = torch.where(usable, d, scales["d"].float())
        dmin = torch.where(usable, dmin, scales["dmin"].float())
        self._offer(best, values, weights, {**scales, "d": _half(d), "dmin": _half(dmin)})

    def steps(self, scales: Scales) -> Steps:
        """Effective parameters, in ggml's order of operations: d * scale first, in float32."""
        d = scales["d"].float()
        if self.scale_range is None:
            scale = d
            minimum = -scales["dmin"].float() if self.affine else torch.zeros_like(d)
        else:
            scale = d[..., None] * scales["scale"].float()
            minimum = torch.zeros_like(scale)
            if self.affine:
                minimum = scales["dmin"].float()[..., None] * scales["minimum"].float()
        rows = d.shape[0]
        scale, minimum = scale.reshape(rows, -1), minimum.reshape(rows, -1)
        zero = torch.full_like(scale, float(self.zero))
        levels = None if self.levels is None else torch.tensor(self.levels)
        return Steps(scale, minimum, zero, self.size, self.low, self.high, levels)

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        """Bytes (rows, bytes of a row), uint8, of codes (rows, n)."""
        rows = codes.shape[0]
        blocks = codes.numpy().reshape(-1, self.block)
        fields = {
            name: value.reshape(len(blocks), *value.shape[2:]).numpy()
            for name, value in scales.items()
        }
        packed = torch.from_numpy(LAYOUTS[self.name].pack(blocks, fields))
        return packed.reshape(rows, -1).contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, Scales]:
        """The inverse of :meth:`pack`. Raises ValueError where rows are no whole blocks."""
        rows, size = packed.shape
        if size % self.block_bytes:
            raise ValueError(f"rows of {size} bytes are no whole number of {self.name} blocks")
        raw = packed.numpy().reshape(-1, self.block_bytes)
        codes, fields = LAYOUTS[self.name].unpack(raw)
        scales = {
            name: torch.from_numpy(value.copy()).reshape(rows, -1, *value.shape[1:])
            for name, value in fields.items()
        }
        return torch.from_numpy(codes.copy()).reshape(rows, -1), scales

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES[self.name]


class _Best:
    """The best parameters so far, chosen by whole blocks or by their parts."""

    def __init__(self) -> None:
        self.scales: Scales = {}
        self.error = torch.empty(0)

    def offer_blocks(self, scales: Scales, error: Tensor) -> None:
        if not self.scales:
            self.scales, self.error = scales, error
            return
        better = error.sum(dim=-1) < self.error.sum(dim=-1)
        for name, new in scales.items():
            mask = better if new.ndim == 2 else better[..., None]
            self.scales[name] = torch.where(mask, new, self.scales[name])
        self.error = torch.where(better[..., None], error, self.error)

    def offer_parts(self, scales: Scales, error: Tensor) -> None:
        better = error < self.error
        for name in ("scale", "minimum"):
            if name in scales:
                self.scales[name] = torch.where(better, scales[name], self.scales[name])
        self.error = torch.where(better, error, self.error)

    def stored(self, dtype: torch.dtype) -> Scales:
        return {
            name: value if value.ndim == 2 else value.to(dtype)
            for name, value in self.scales.items()
        }


def _half(values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        peak = float(values.abs().max())
        raise ValueError(f"a block needs a scale of {peak:.4g}, past half precision's {HALF_MAX:g}")
    return half


def _inverse(d: Tensor) -> Tensor:
    inverse = 1.0 / d.float()
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


# kvalues_iq4nl in ggml-common.h (llama.cpp)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

GRIDS: dict[str, GgufGrid] = {
    grid.name: grid
    for grid in (
        GgufGrid("Q8_0", 32, 32, 1, 255, zero=128),  # -127..127, as ggml's own quantiser
        GgufGrid("Q5_0", 32, 32, 0, 31, zero=16),
        GgufGrid("Q5_1", 32, 32, 0, 31, affine=True),
        GgufGrid("Q4_0", 32, 32, 0, 15, zero=8),
        GgufGrid("IQ4_NL", 32, 32, 0, 15, levels=tuple(float(level) for level in _IQ4_NL)),
        GgufGrid("Q6_K", 256, 16, 0, 63, zero=32, scale_range=(-128, 127)),
        GgufGrid("Q5_K", 256, 32, 0, 31, affine=True, scale_range=(0, 63)),
        GgufGrid("Q4_K", 256, 32, 0, 15, affine=True, scale_range=(0, 63)),
        GgufGrid("Q3_K", 256, 16, 0, 7, zero=4, scale_range=(-32, 31)),
        GgufGrid("Q2_K", 256, 16, 0, 3, affine=True, scale_range=(0, 15)),
    )
}

BLOCK_BYTES = {
    "Q8_0": 34,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q4_0": 18,
    "IQ4_NL": 18,
    "Q6_K": 210,
    "Q5_K": 176,
    "Q4_K": 144,
    "Q3_K": 110,
    "Q2_K": 84,
}
