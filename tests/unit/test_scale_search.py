"""Searches for a block's scale against scans of scales, each value at its nearest point."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from svdexport.core import grids_gguf
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.grids_search import (
    _line,
    affine_scale,
    affine_scale_and_zero,
    level_scale,
    rounding_error,
    symmetric_scale,
)

KINDS = ["normal", "positive", "outlier", "constant"]
LEVELS = torch.tensor(GRIDS["IQ4_NL"].levels)
BLOCKS, SIZE = 24, 32


def example(kind: str) -> tuple[Tensor, Tensor]:
    """Values (BLOCKS, SIZE) and weights of the columns that differ by a factor of ten."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    values = torch.randn(BLOCKS, SIZE, generator=generator)
    if kind == "positive":
        values = values.abs() + 0.5
    if kind == "outlier":
        values[:, 5] = values[:, 5].sign() * 6.0
    if kind == "constant":
        values[:] = values[:, :1]
    return values, torch.rand(SIZE, generator=generator) * 0.9 + 0.1


def error_at(values: Tensor, weights: Tensor, points: Tensor) -> Tensor:
    """Weighted squared error (blocks,) of each value at the nearest of its block's points (blocks,
    count), float64."""
    gaps = values.double()[:, :, None] - points.double()[:, None, :]
    return (gaps.square().amin(dim=-1) * weights.double()).sum(dim=-1)


def least(values: Tensor, weights: Tensor, tried: Iterable[Tensor]) -> Tensor:
    """The smallest error (blocks,) of many choices of points."""
    errors = [error_at(values, weights, points) for points in tried]
    return torch.stack(errors).amin(dim=0)


def scales_of(values: Tensor, end: float) -> Iterable[Tensor]:
    """400 scales (blocks, 1), of both signs: the largest value at half to three times the range."""
    peak = values.abs().amax(dim=-1, keepdim=True).double()
    for place in torch.linspace(0.5, 3.0, 200, dtype=torch.float64):
        yield peak / (end * place)
        yield -peak / (end * place)


def excess(found: Tensor, best: Tensor) -> float:
    """How much of all blocks' error a search leaves that a scan would have taken away."""
    return float(found.sum() / best.sum()) - 1.0


RANGES = [(-2, 1), (-4, 3), (-8, 7), (-16, 15), (-32, 31), (-127, 127), (-128, 127)]
MOST = {  # measured, where it is more than 5 %: few codes, or an outlier that a scan would clip
    (-2, 1): {"normal": 0.06, "positive": 0.21, "outlier": 0.57},
    (-4, 3): {"outlier": 0.28},
    (-127, 127): {"positive": 0.08, "outlier": 0.09},
    (-128, 127): {"outlier": 0.11},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_scan_finds_little_better_scales(kind: str, low: int, high: int) -> None:
    values, weights = example(kind)
    codes = torch.arange(low, high + 1)
    found = error_at(values, weights, symmetric_scale(values, weights, low, high)[:, None] * codes)
    if kind == "constant":
        assert float(found.max()) < 1e-10
        return
    best = least(values, weights, (s * codes for s in scales_of(values, -low)))
    assert excess(found, best) < MOST.get((low, high), {}).get(kind, 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_no_end_has_a_better_least_squares_scale(kind: str, low: int, high: int) -> None:
    """Of the codes that come out where a block's largest value lies at either end of the range,
    or up to 30 % inside or 15 % outside of it. Of 8 bits, at the long end or 1 % inside."""
    values, weights = (part.double() for part in example(kind))
    codes = torch.arange(low, high + 1)
    peak = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    places = [f * end for f in (0.7, 0.925, 1.015, 1.15) for end in (low, high)]
    if high > 15:
        places = [f * end for f in (0.9, 0.975, 1.05) for end in (low, high)]
    if high > 100:
        places = [low, 0.99 * low]
    tried = []
    for place in places:
        code = (values * place / peak).round().clamp(low, high)
        scale = (weights * values * code).sum(1) / (weights * code * code).sum(1)
        tried.append((weights * (values - scale[:, None] * code).square()).sum(1))
    found = error_at(values, weights, symmetric_scale(*example(kind), low, high)[:, None] * codes)
    assert bool((found <= torch.stack(tried).amin(dim=0) * (1 + 1e-5) + 1e-10).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_finds_no_better_scale_of_uneven_levels(kind: str) -> None:
    values, weights = example(kind)
    found = error_at(values, weights, level_scale(values, weights, LEVELS)[:, None] * LEVELS)
    best = least(values, weights, (s * LEVELS for s in scales_of(values, 127.0)))
    assert bool((found <= 1.02 * best + 1e-10).all())


@pytest.mark.parametrize("kind", ["normal", "positive", "outlier"])
@pytest.mark.parametrize(("high", "most"), [(3, 0.32), (15, 0.06), (31, 0.04)])
def test_a_scan_finds_little_better_scales_and_minima(kind: str, high: int, most: float) -> None:
    values, weights = example(kind)
    codes = torch.arange(high + 1)
    scale, minimum = affine_scale(values, weights, high)
    assert bool((scale >= 0).all()) and bool((minimum >= 0).all())
    floor = -values.amin(dim=-1, keepdim=True).clamp_max(0.0).double()
    span = values.amax(dim=-1, keepdim=True).double() + floor

    def tried() -> Iterable[Tensor]:
        for above in torch.linspace(0.5, 1.1, 40, dtype=torch.float64):
            for below in torch.linspace(0.0, 1.1, 40, dtype=torch.float64):
                yield span * above / high * codes - floor * below

    found = error_at(values, weights, scale[:, None] * codes - minimum[:, None])
    assert excess(found, least(values, weights, tried())) < most


@pytest.mark.parametrize("kind", ["normal", "positive", "outlier"])
@pytest.mark.parametrize("high", [3, 15, 31])
def test_no_end_has_a_better_least_squares_line(kind: str, high: int) -> None:
    """Of the codes that come out where the largest value lies at, inside or outside the last."""
    values, weights = example(kind)
    scale, minimum = affine_scale(values, weights, high)
    points = scale[:, None] * torch.arange(high + 1) - minimum[:, None]
    found = error_at(values, weights, points)
    root = weights.double().sqrt()
    for place in (0.65, 0.9125, 1.1) if high < 8 else (0.9, 1.0125, 1.05):
        for block in range(BLOCKS):
            row = values[block].double()
            floor = row.min().clamp_max(0.0)
            codes = ((row - floor) * place * high / (row.max() - floor)).round().clamp(0, high)
            rows = torch.stack([codes, -torch.ones(SIZE)], dim=1) * root[:, None]
            solved = torch.linalg.lstsq(rows, row * root).solution
            if solved[1] < 0:  # no minimum below zero is stored
                solved = torch.linalg.lstsq(rows[:, :1], row * root).solution
            left = (rows[:, : len(solved)] @ solved - row * root).square().sum()
            assert found[block] <= left * (1 + 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("high", "most"), [(3, 0.08), (15, 0.06)])
def test_a_scan_finds_little_better_scales_and_zeros(kind: str, high: int, most: float) -> None:
    values, weights = example(kind)
    codes = torch.arange(high + 1)
    scale, zero = affine_scale_and_zero(values, weights, high)
    assert bool((scale >= 0).all())
    assert bool((zero == zero.round()).all()) and bool(((zero >= 0) & (zero <= high)).all())
    found = error_at(values, weights, scale[:, None] * (codes - zero[:, None]))
    if kind == "constant":
        assert float(found.max()) < 1e-10
        return
    top = values.abs().amax(dim=-1, keepdim=True).double()

    def tried() -> Iterable[Tensor]:
        for at in range(high + 1):
            for place in torch.linspace(0.2, 2.2, 100, dtype=torch.float64):
                yield top * place / high * (codes - at)

    assert excess(found, least(values, weights, tried())) < most


def test_at_eight_bits_both_ends_and_zero_are_points() -> None:
    values, weights = example("normal")
    scale, zero = affine_scale_and_zero(values, weights, 255)
    points = scale[:, None] * (torch.arange(256) - zero[:, None])
    for end in (values.amin(dim=-1), values.amax(dim=-1), torch.zeros(BLOCKS)):
        gap = (points - end[:, None]).abs().amin(dim=-1)
        assert bool((gap <= 1.01 * scale).all())
    assert bool((points == 0).any(dim=-1).all())
    span = values.amax(dim=-1) - values.amin(dim=-1)
    assert torch.allclose(scale, span / 255, rtol=0.01)


def line(codes: Tensor, weights: Tensor, values: Tensor) -> tuple[float, float, float]:
    weighted = values * weights
    found = _line(codes, weights, weighted, weights.sum(-1), weighted.sum(-1))
    scale, minimum, gain = (float(part) for part in found)
    return scale, minimum, gain


@pytest.mark.parametrize("seed", range(8))
def test_a_line_is_weighted_least_squares_with_a_minimum_of_at_least_zero(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (SIZE,), generator=generator).double()
    weights = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    shift = -2.0 if seed % 2 else 2.0  # half of them would have a minimum below zero
    values = 0.3 * codes + shift + 0.1 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    root = weights.sqrt()
    rows = torch.stack([codes, -torch.ones(SIZE, dtype=torch.float64)], dim=1)
    if shift > 0:
        rows = rows[:, :1]
    solved = torch.linalg.lstsq(rows * root[:, None], (values * root)[:, None]).solution[:, 0]
    slow = [float(part) for part in solved] + [0.0] * (shift > 0)
    scale, minimum, gain = line(codes, weights, values)
    assert (scale, minimum) == pytest.approx(slow, rel=1e-9)
    left = (weights * (values - scale * codes + minimum).square()).sum()
    assert gain == pytest.approx(float((weights * values.square()).sum() - left), rel=1e-9)


def test_a_line_through_one_code_or_without_weight() -> None:
    one, weights = torch.full((3,), 2.0), torch.tensor([1.0, 1.0, 2.0])
    # one code for all: values below zero are the minimum's, mean -0.75; others the scale's
    assert line(one, weights, torch.tensor([-1.0, 0.0, -1.0])) == pytest.approx((0.0, 0.75, 2.25))
    assert line(one, weights, torch.tensor([1.0, 0.0, 1.0])) == pytest.approx((0.375, 0.0, 2.25))
    # all at code 0: only a minimum could help
    zero = torch.zeros(3)
    assert line(zero, weights, torch.tensor([1.0, 0.0, 1.0])) == (0.0, 0.0, 0.0)
    assert line(zero, weights, torch.tensor([-1.0, 0.0, -1.0])) == pytest.approx((0.0, 0.75, 2.25))
    assert line(torch.arange(3.0), zero, torch.tensor([1.0, 0.0, 1.0])) == (0.0, 0.0, 0.0)


HEAVY = [0.0, 1e2, 1e4]


def uneven(heavy: float) -> tuple[Tensor, Tensor]:
    """4000 positive values (4000, 1) and uneven weights (4000, SIZE), one of which may be heavy."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(4000, 1, generator=generator).abs() + 0.5
    weights = torch.rand(4000, SIZE, generator=generator).square() + 0.01
    if heavy:
        weights[:, 0] = heavy
    return values, weights


@pytest.mark.parametrize("heavy", HEAVY)
def test_rounding_makes_no_slope_of_equal_codes(heavy: float) -> None:
    values, weights = uneven(heavy)
    weighted = values * weights
    for code in range(1, 32):
        codes = torch.full_like(weights, float(code))
        scale, minimum, _ = _line(codes, weights, weighted, weights.sum(-1), weighted.sum(-1))
        assert minimum.count_nonzero() == 0
        assert torch.allclose(code * scale, values[:, 0], rtol=9e-7, atol=0.0)  # measured: 6e-7


@pytest.mark.parametrize("heavy", HEAVY)
@pytest.mark.parametrize("high", [3, 15, 31])
def test_constant_positive_blocks_of_uneven_weight_are_met(high: int, heavy: float) -> None:
    values, weights = uneven(heavy)
    scale, minimum = affine_scale(values.expand_as(weights), weights, high)
    points = scale[:, None] * torch.arange(high + 1) - minimum[:, None]
    gap = (points / values - 1.0).abs().amin(dim=-1)
    assert float(gap.max()) < 9e-7  # measured: 6e-7


@pytest.mark.parametrize("spread", [0.001, 0.03, 0.1])
@pytest.mark.parametrize(("heavy", "most"), [(0.0, 0.0015), (1e2, 0.0015), (1e4, 0.16)])
@pytest.mark.parametrize("high", [3, 15, 31])
def test_nearly_constant_blocks_are_searched_as_in_float64(
    high: int, heavy: float, most: float, spread: float
) -> None:
    """Measured: 0.1 % more error, and 11 % beside a weight of 10,000."""
    values, weights = uneven(heavy)
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(6))
    values, codes = values * (1.0 + spread * noise), torch.arange(high + 1)
    single, double = (
        error_at(values, weights, scale[:, None] * codes - minimum[:, None])
        for scale, minimum in (
            affine_scale(values, weights, high),
            affine_scale(values.double(), weights.double(), high),
        )
    )
    assert excess(single, double) < most


def test_blocks_without_weight_or_without_values() -> None:
    """No column matters: the largest value at the end of the range. No value: a scale of 0."""
    values, none = example("normal")[0], torch.zeros(SIZE)
    peak = values.gather(1, values.abs().argmax(dim=1, keepdim=True))[:, 0]
    assert torch.allclose(symmetric_scale(values, none, -8, 7), peak / -8)
    assert torch.allclose(level_scale(values, none, LEVELS), peak / -127)
    for high in (3, 15, 31):
        scale, minimum = affine_scale(values, none, high)
        assert torch.allclose(scale, (values.amax(dim=1) - values.amin(dim=1)) / high)
        assert torch.equal(minimum, -values.amin(dim=1))
    scale, zero = affine_scale_and_zero(values, none, 15)
    span = values.amax(dim=1) - values.amin(dim=1)
    assert torch.allclose(scale, span / 15)
    assert torch.equal(zero, (-values.amin(dim=1) / scale).round())
    nothing = torch.zeros(2, SIZE)
    for found in (
        symmetric_scale(nothing, torch.ones(SIZE), -8, 7),
        level_scale(nothing, torch.ones(SIZE), LEVELS),
        *affine_scale(nothing, torch.ones(SIZE), 15),
        affine_scale_and_zero(nothing, torch.ones(SIZE), 15)[0],
    ):
        assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_error_is_that_of_the_nearest_codes(sign: float) -> None:
    values, weights = example("normal")
    scale = sign * (torch.rand(BLOCKS, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.1)
    scale[0] = 0.0  # every code then stands for minus the minimum
    minimum = torch.linspace(0.0, 1.0, BLOCKS)
    points = scale[:, None] * torch.arange(-4, 4) - minimum[:, None]
    found = rounding_error(values, weights, scale, minimum, -4, 3)
    assert torch.allclose(found.double(), error_at(values, weights, points), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_rows_are_searched_alike_in_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) + 0.1
    whole = GRIDS[name].search(weight, importance)
    monkeypatch.setattr(grids_gguf, "_ROWS_AT_ONCE", 3 * 512)  # 3, 3 and 1
    found = GRIDS[name].search(weight, importance)
    assert set(found) == set(whole)
    for part, expected in whole.items():
        assert torch.equal(found[part], expected), part
