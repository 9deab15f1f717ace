"""The factorisation against the slow, obvious formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdexport.core import decompose as decompose_module
from svdexport.core.decompose import damped as damped_moments
from svdexport.core.decompose import (
    damped_cholesky,
    decompose,
    fit,
    fit_of_optimum,
    quadratic,
    squared_norm,
)
from svdexport.core.gauge import in_even_gauge
from svdexport.core.lowrank import FactorPair
from svdexport.core.moments import Moment
from svdexport.factorize import METHODS, GroupData

SHAPES = [(24, 16), (16, 24), (16, 16)]


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def moment(size: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x


def slow(weight: Tensor, h: Tensor | None, g: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """B A by a full SVD of G^1/2 W H^1/2 with both roots undone, and the singular values."""
    m, n = weight.shape
    left = root(g) if g is not None else torch.eye(m, dtype=torch.float64)
    right = root(h) if h is not None else torch.eye(n, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(left @ weight @ right)
    kept = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
    return torch.linalg.inv(left) @ kept @ torch.linalg.inv(right), s


def damped(g: Tensor, share: float) -> Tensor:
    return g + share * g.diagonal().mean() * torch.eye(g.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("with_h", [False, True])
@pytest.mark.parametrize("with_g", [False, True])
def test_it_is_the_weighted_optimum(
    shape: tuple[int, int],
    rank: int,
    with_h: bool,
    with_g: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decompose_module, "ROWS", 7)  # several parts, the last one shorter
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = moment(shape[1], 200, 2) if with_h else None
    g = moment(shape[0], 200, 3) if with_g else None
    found = decompose([weight], h, None if g is None else [g], output_damping=0.1)
    expected, sigma = slow(weight, h, None if g is None else damped(g, 0.1), rank)
    product = found.b[:, :rank].double() @ found.a[:rank].double()
    assert torch.allclose(product, expected, atol=2e-4 * float(expected.abs().max()))
    count = min(shape)
    # H is damped by 1e-6 of its mean eigenvalue, which the smallest energies feel
    assert torch.allclose(
        found.energies[:count], sigma[:count] ** 2, atol=1e-5 * float(sigma[0] ** 2)
    )


def test_the_error_is_the_sum_of_the_dropped_energies() -> None:
    weight = torch.randn(20, 30, dtype=torch.float64)
    h = moment(30, 300, 4)
    found = decompose([weight], h)
    for rank in (3, 11):
        difference = weight - found.pair(rank).dense().double()
        error = torch.trace(difference @ h @ difference.T)
        assert torch.isclose(error, found.energies[rank:].sum(), rtol=1e-4)


def test_members_are_stacked_and_weighed_each_by_its_own_gradients() -> None:
    weights = [torch.randn(m, 12, dtype=torch.float64) for m in (10, 6)]
    gs = [moment(m, 100, m) for m in (10, 6)]
    h = moment(12, 100, 7)
    found = decompose(weights, h, gs)
    stacked = torch.cat(weights)
    g = torch.block_diag(*(damped(g, 0.1) for g in gs))
    expected, _ = slow(stacked, h, g, 4)
    product = found.pair(4).dense().double()
    assert torch.allclose(product, expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_output_gradients_nothing_costs_loss(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = moment(shape[1], 200, 2)
    found = decompose([weight], h, [torch.zeros(shape[0], shape[0], dtype=torch.float64)])
    assert float(found.energies.abs().sum()) == 0.0
    plain = decompose([weight], h).pair(5).dense()
    assert torch.allclose(found.pair(5).dense(), plain, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("columns", [12, 20])
@pytest.mark.parametrize("share", [0.1, 0.0])
def test_a_member_without_output_gradients_does_not_lead_its_group(
    columns: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(m, columns, generator=generator).double() for m in (10, 6)]
    live, h = 1e-9 * moment(10, 100, 10), moment(columns, 100, 7)
    dead = torch.zeros(6, 6, dtype=torch.float64)
    found = decompose(weights, h, [live, dead], output_damping=share)
    scale = max(share, 1e-6) * float(live.diagonal().mean())
    g = torch.block_diag(damped(live, share), scale * torch.eye(6, dtype=torch.float64))
    expected, sigma = slow(torch.cat(weights), h, g, 4)
    product = found.pair(4).dense().double()
    assert torch.allclose(product, expected, atol=1e-3 * float(expected.abs().max()))
    assert float(found.energies.sum()) == pytest.approx(float((sigma**2).sum()), rel=1e-4)
    added = list(damped_moments([live, dead], share))
    assert torch.allclose(torch.block_diag(*added), g, rtol=1e-12, atol=0.0)


def test_full_rank_gives_the_weight_back() -> None:
    weight = torch.randn(9, 14, dtype=torch.float64)
    found = decompose([weight], moment(14, 60, 1), [moment(9, 60, 2)])
    assert torch.allclose(found.pair(9).dense().double(), weight, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("with_h", [False, True])
def test_relative_errors_against_the_definition(
    shape: tuple[int, int], members: int, with_h: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one linear and of two that are stacked; without H the inputs are X = I."""
    monkeypatch.setattr(decompose_module, "ROWS", 7)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    weights = list(weight.split([shape[0]] if members == 1 else [10, shape[0] - 10]))
    x = torch.eye(shape[1], dtype=torch.float64)
    if with_h:
        x = torch.randn(shape[1], 50, generator=generator, dtype=torch.float64)
    h = x @ x.T if with_h else None
    gradients = [moment(len(w), 80, 3 + i) for i, w in enumerate(weights)]
    found = decompose(weights, h, gradients)
    fitted = fit(weights, found, h)
    for rank in (1, 4, 12):
        approximate = found.pair(rank).dense().double()
        expected = torch.linalg.norm((weight - approximate) @ x) / torch.linalg.norm(weight @ x)
        assert torch.isclose(fitted.errors[rank - 1], expected, atol=1e-5)
    inner = found.a.double() @ x
    assert torch.allclose(fitted.squares, inner.square().sum(dim=1), rtol=1e-9)


@pytest.mark.parametrize("with_h", [False, True])
def test_in_the_even_gauge_both_factors_of_a_component_carry_as_much(with_h: bool) -> None:
    """||b_j|| = ||a_j X||, and their product is the singular value; without H the inputs are I."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    h = moment(16, 60, 7) if with_h else None
    found = decompose([weight], h)
    even = in_even_gauge(found, h)
    root = torch.linalg.cholesky(h) if h is not None else torch.eye(16, dtype=torch.float64)
    sigma = torch.linalg.svdvals(weight @ root)
    assert torch.allclose(even.b.double().norm(dim=0), sigma.sqrt(), rtol=1e-4)
    assert torch.allclose((even.a.double() @ root).norm(dim=1), sigma.sqrt(), rtol=1e-4)
    for rank in (1, 5, 16):
        whole = found.pair(rank).dense()
        assert torch.allclose(even.pair(rank).dense(), whole, atol=1e-5 * float(whole.abs().max()))


def test_fewer_tokens_than_width_and_dead_channels_are_damped() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    x[:, 3] = 0.0
    weight = torch.randn(20, 16, dtype=torch.float64)
    found = decompose([weight], x.T @ x)
    assert torch.isfinite(found.a).all()
    assert torch.isfinite(found.b).all()
    # five tokens span five directions: rank 5 reproduces the outputs
    outputs = (weight - found.pair(5).dense().double()) @ x.T
    assert float(outputs.norm() / (weight @ x.T).norm()) < 1e-2


def test_zero_moments_and_zero_weights_stay_finite() -> None:
    zero = torch.zeros(8, 8, dtype=torch.float64)
    found = decompose([torch.zeros(8, 8)], zero, [zero])
    assert torch.isfinite(found.a).all()
    assert torch.isfinite(found.b).all()
    assert float(found.energies.sum()) == 0.0


def test_nan_moment_is_refused() -> None:
    bad = torch.full((4, 4), float("nan"), dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN"):
        damped_cholesky(bad, 0.0)


def test_damping_is_raised_until_the_factor_exists() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.01], dtype=torch.float64))
    factor, used = damped_cholesky(indefinite, 1e-6)
    assert used > 0.01
    assert torch.isfinite(factor).all()


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(0, 11),
    seed=st.integers(0, 2**16),
)
def test_no_other_pair_of_that_rank_is_better(m: int, n: int, rank: int, seed: int) -> None:
    """Eckart and Young: no product of that rank is nearer than the dropped singular values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 3 * n, generator=generator, dtype=torch.float64)
    rank = 1 + rank % min(m, n)
    found = decompose([weight], x @ x.T)
    error = (weight - found.pair(rank).dense().double()) @ x
    sigma = torch.linalg.svdvals(weight @ x)
    least, whole = float(sigma[rank:].square().sum()), float(sigma.square().sum())
    assert float(error.square().sum()) <= least * (1 + 1e-6) + 1e-8 * whole


def test_moments_match_float64() -> None:
    x = torch.randn(3, 700, 24) * torch.logspace(-3, 3, 24)
    found = Moment(24)
    found.add(x)
    rows = x.reshape(-1, 24).double()
    expected = rows.T @ rows
    scale = expected.diagonal().sqrt()
    assert found.rows == 2100
    assert found.matrix.dtype == torch.float64
    assert float(((found.matrix - expected) / scale[:, None] / scale).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(7, 600), (300, 257), (64, 256), (5, 2570)])
def test_half_of_the_work_gives_the_whole_quadratic_form(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = moment(shape[1], 50, 2)
    expected = weight @ h @ weight.T
    found = quadratic(weight, h)
    assert torch.allclose(found, expected, atol=1e-12 * float(expected.abs().max()))
    assert torch.equal(found, found.T)
    assert float(squared_norm(weight, h)) == pytest.approx(float(expected.trace()), rel=1e-12)


@pytest.mark.parametrize(("loudest", "single"), [(1.0, True), (30.0, True), (1e5, False)])
def test_a_product_in_float32_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, loudest: float, single: bool
) -> None:
    """Where loud channels would make its rounding count, A is multiplied in float64."""
    weight = torch.randn(96, 300, generator=torch.Generator().manual_seed(1))
    loud = torch.ones(300, dtype=torch.float64)
    loud[::50] = loudest
    h = moment(300, 900, 2) * loud * loud[:, None]
    exact = decompose([weight], h, max_rank=60).pair(60)
    monkeypatch.setattr(decompose_module, "SMALLEST_DOUBLE", 1)
    found = decompose([weight], h, max_rank=60).pair(60)
    assert torch.equal(found.a, exact.a) != single

    def error(pair: FactorPair) -> float:
        rest = weight.double() - pair.b.double() @ pair.a.double()
        return float(((rest @ h) * rest).sum())

    assert error(found) <= error(exact) * (1 + 1e-7)


@pytest.mark.parametrize("method", ["svd_llm", "svd_llm_v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fit_of_an_optimum_needs_no_product(method: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    h = moment(shape[1], 200, 2)
    data = GroupData((weight,), h, None, max_rank=12, damping=0.1)
    found = METHODS[method].factorize(data)
    quick, slow_fit = fit_of_optimum(found), fit([weight], found, h)
    a = found.a.double()
    assert torch.allclose(slow_fit.squares, torch.diagonal(a @ h @ a.T), rtol=1e-9)
    assert torch.allclose(quick.errors, slow_fit.errors, rtol=1e-4)
    assert torch.allclose(quick.squares, slow_fit.squares, rtol=1e-4)


def test_a_moment_is_the_sum_of_outer_products() -> None:
    x = torch.randn(3, 700, 400, generator=torch.Generator().manual_seed(1))
    found = Moment(400)
    found.add(x[:2])
    found.add(x[2:].transpose(1, 2).contiguous().transpose(1, 2))  # rows that are not contiguous
    rows = x.reshape(-1, 400).double()
    scale = rows.square().sum(0).sqrt()
    assert float(((found.matrix - rows.T @ rows) / scale[:, None] / scale).abs().max()) < 1e-6
    assert torch.equal(found.matrix, found.matrix.T)
