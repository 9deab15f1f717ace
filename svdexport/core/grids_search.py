"""Searches for the scales of a quantisation block, by weighted squared error.

All functions work on values (..., size) whose last axis shares one scale, with weights that
broadcast to them. Candidates are tried by rounding; the scale is then the weighted least-squares
solution for the codes that came out (the approach of ggml's ``make_qx_quants`` and
``make_qkx3_quants``, here over all blocks at once).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svdexport.core.grids import nearest_level

_FLAT = 1e-11  # below this share of the codes' mean square, their variance is float32 rounding


def symmetric_scale(values: Tensor, weights: Tensor, low: int, high: int) -> Tensor:
    """Signed scales s (...) such that s * clamp(round(v / s), low, high) is near v."""

    def nearest(scaled: Tensor) -> Tensor:
        return scaled.round_().clamp_(low, high)

    return _signed_scale(values, weights, low, _ends(low, high), nearest)


def level_scale(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Signed scales s (...) such that s times the level nearest to v / s is near v."""

    def nearest(scaled: Tensor) -> Tensor:
        return levels[nearest_level(scaled, levels)]

    spread = torch.linspace(0.7, 1.15, 11).tolist()
    low, high = float(levels[0]), float(levels[-1])
    ends = [f * low for f in spread] + [f * high for f in spread]
    return _signed_scale(values, weights, low, ends, nearest)


def _signed_scale(
    values: Tensor,
    weights: Tensor,
    low: float,
    ends: Sequence[float],
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """The best least-squares scale over the ends at which a block's largest value may lie."""
    peak = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))
    safe = torch.where(peak == 0, torch.ones_like(peak), peak)
    best_gain = torch.full(peak.shape[:-1], -1.0)
    best = torch.zeros(peak.shape[:-1])
    weighted = values * weights
    for end in ends:
        codes = nearest(values * (end / safe))
        cross = (weighted * codes).sum(dim=-1)
        square = (codes * codes * weights).sum(dim=-1)
        scale = torch.where(square > 0, cross / square, torch.zeros_like(cross))
        gain = cross * scale
        better = gain > best_gain
        best = torch.where(better, scale, best)
        best_gain = torch.where(better, gain, best_gain)
    # A block whose weights are all 0 has no preference: its largest value at the range's end.
    plain = peak[..., 0] / low
    return torch.where((best == 0) & (peak[..., 0] != 0), plain, best)


def _ends(low: int, high: int) -> list[float]:
    """Codes at which a block's largest value may come to lie, at both ends of the range."""
    if high > 100:  # 8 bits: clipping never pays
        return [float(low), 0.99 * low]
    count = 11 if high < 16 else 5
    spread = torch.linspace(0.7, 1.15, count) if high < 16 else torch.linspace(0.9, 1.05, count)
    return [float(f) * low for f in spread] + [float(f) * high for f in spread]


def affine_scale(values: Tensor, weights: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum), both at least 0: scale * code - minimum near v, codes 0..high."""
    floor = values.amin(dim=-1, keepdim=True).clamp_max(0.0)
    top = values.amax(dim=-1, keepdim=True)
    span = (top - floor).clamp_min(0.0)
    safe = torch.where(span == 0, torch.ones_like(span), span)
    best = torch.full(span.shape[:-1], float("inf"))
    scale, minimum = span[..., 0] / high, -floor[..., 0]
    weights = weights.expand_as(values)
    weighted = values * weights
    total, first = weights.sum(dim=-1), weighted.sum(dim=-1)
    square = (weighted * values).sum(dim=-1)
    for end in torch.linspace(0.65, 1.1, 13) if high < 8 else torch.linspace(0.9, 1.05, 9):
        codes = ((values - floor) * (float(end) * high / safe)).round_().clamp_(0, high)
        s, m, gain = _line(codes, weights, weighted, total, first)
        error = square - gain
        better = (error < best) & (total > 0)  # without weight, the whole span stays
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
        best = torch.where(better, error, best)
    return scale.clamp_min(0.0), minimum.clamp_min(0.0)


def affine_scale_and_zero(values: Tensor, weights: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """(scale, integer zero in 0..high): scale * (code - zero) near v, codes 0..high."""
    floor = values.amin(dim=-1).clamp_max(0.0)
    top = values.amax(dim=-1).clamp_min(0.0)
    best = torch.full(floor.shape, float("inf"))
    scale, zero = torch.zeros_like(floor), torch.zeros_like(floor)
    shrink = (1.0,) if high > 100 else (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
    for below, above in itertools.product(shrink, shrink):
        s = (top * above - floor * below) / high
        safe = torch.where(s == 0, torch.ones_like(s), s)
        z = (-floor * below / safe).round().clamp(0, high)
        codes = (values / safe[..., None]).round_().add_(z[..., None]).clamp_(0, high)
        codes = codes.sub_(z[..., None])
        square = (codes * codes * weights).sum(dim=-1)
        cross = (codes * values * weights).sum(dim=-1)
        s = torch.where(square > 0, cross / square.clamp_min(1e-38), s)
        error = (codes.mul_(s[..., None]).sub_(values).square_() * weights).sum(dim=-1)
        better = error < best
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        best = torch.where(better, error, best)
    return scale, zero


def _line(
    codes: Tensor, weights: Tensor, weighted: Tensor, total: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares of v by s * code - m with m >= 0: s, m and what it explains.

    About the codes' mean: where codes are nearly equal, total * sum(w c c) - sum(w c)^2 cancels.
    """
    safe = torch.where(total > 0, total, torch.ones_like(total))
    mean_code, mean_value = (codes * weights).sum(dim=-1) / safe, first / safe
    offset = codes - mean_code[..., None]
    weighted_offset = offset * weights
    spread = (weighted_offset * offset).sum(dim=-1)
    rise = (weighted * offset).sum(dim=-1)
    rise = rise - mean_value * weighted_offset.sum(dim=-1)  # 0 but for the mean code's rounding
    c2, cross = spread + total * mean_code.square(), rise + first * mean_code
    usable = spread > _FLAT * c2
    s = torch.where(usable, rise / torch.where(usable, spread, torch.ones_like(spread)), 0.0)
    m = torch.where(usable, s * mean_code - mean_value, 0.0)
    only = torch.where(c2 > 0, cross / c2.clamp_min(1e-38), torch.zeros_like(c2))
    s = torch.where(~usable | (m < 0), only, s)
    m = torch.where(m < 0, torch.zeros_like(m), m)
    flat = ~usable & (first < 0)  # one code for all: the minimum alone is the value
    m = torch.where(flat, -first / total.clamp_min(1e-38), m)
    s = torch.where(flat, torch.zeros_like(s), s)
    return s, m, s * cross - m * first


def rounding_error(
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    minimum: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Weighted squared error (...) of rounding to scale * code - minimum, codes low..high."""
    inverse = 1.0 / scale
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
    shifted = values + minimum[..., None]
    codes = (shifted * inverse[..., None]).round_().clamp_(low, high)
    difference = codes.mul_(scale[..., None]).sub_(shifted)
    return (difference.square_() * weights).sum(dim=-1)
