"""A quantised base and the pair that holds what it lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdexport.core.gptq import GptqConfig, gptq, gptq_pair, round_to_nearest
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.lowrank import FactorPair
from svdexport.core.residual import fit_residual


def example(m: int = 48, n: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with a falling spectrum, and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q[:, :m]
    weight = u * torch.arange(1, m + 1) ** -0.7 @ v.T
    x = torch.randn(500, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return weight, (x.T @ x).double()


def rtn(values: Tensor) -> Tensor:
    return round_to_nearest(values, None, GRIDS["Q4_0"]).values


def slow_loss(weight: Tensor, base: Tensor, pair: FactorPair, h: Tensor, g: Tensor) -> float:
    """||G^1/2 (W - Q - B A) H^1/2||^2 / ||G^1/2 W H^1/2||^2 by eigendecompositions."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    rest = weight.double() - base.double() - pair.b.double() @ pair.a.double()
    left, right = root(g), root(h)
    whole = (left @ weight.double() @ right).square().sum()
    return float((left @ rest @ right).square().sum() / whole)


def test_first_round_is_the_truncation_of_what_the_base_lost() -> None:
    weight, h = example()
    found = fit_residual(weight, h, 8, rtn, rounds=1)
    assert torch.equal(found.base, rtn(weight))
    values, vectors = torch.linalg.eigh(h)
    root = vectors * values.sqrt() @ vectors.T
    error = (weight - found.base).double() @ root
    dropped = torch.linalg.svdvals(error)[8:].square().sum()
    expected = float(dropped / (weight.double() @ root).square().sum())
    assert found.losses[0] == pytest.approx(expected, rel=1e-5)


def test_rounds_lower_the_loss_and_the_best_is_kept() -> None:
    weight, h = example()
    config = GptqConfig(0.01)

    def base(values: Tensor) -> Tensor:
        return gptq(values, h, GRIDS["Q4_0"], config).values

    def eight_bits(pair: FactorPair) -> FactorPair:
        a, b = gptq_pair(pair, h, GRIDS["Q8_0"], GRIDS["Q8_0"], config)
        return FactorPair(a.values, b.values)

    once = fit_residual(weight, h, 32, base, rounds=1, round_pair=eight_bits)
    more = fit_residual(weight, h, 32, base, rounds=4, round_pair=eight_bits)
    assert more.losses[0] == once.losses[0]
    assert min(more.losses) < 0.95 * once.losses[0]
    identity = torch.eye(len(weight), dtype=torch.float64)
    kept = slow_loss(weight, more.base, more.pair, h, identity)
    assert kept == pytest.approx(min(more.losses), rel=1e-4)


def test_metric_of_the_gradients_and_a_start() -> None:
    weight, h = example()
    y = torch.randn(300, 48, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        0.1, 3, 48
    )
    g = (y.T @ y).double()
    parts = [g[:16, :16], g[16:, 16:]]
    start = FactorPair(torch.ones(1, 64), torch.ones(48, 1))
    found = fit_residual(
        weight, h, 8, rtn, gradients=parts, output_damping=0.1, start=start, rounds=2
    )
    damped = torch.block_diag(
        *[p + 0.1 * p.diagonal().mean() * torch.eye(len(p), dtype=p.dtype) for p in parts]
    )
    kept = slow_loss(weight, found.base, found.pair, h, damped)
    assert kept == pytest.approx(min(found.losses), rel=1e-4)
    with pytest.raises(ValueError, match="rank 49"):
        fit_residual(weight, h, 49, rtn)
