"""The gauge in which pairs are made: same product, less lost in blocks of mixed components."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from svdexport.core.decompose import decompose
from svdexport.core.gauge import (
    even_scales,
    evened,
    hadamard,
    in_even_gauge,
    mixed,
    mixed_squares,
)
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import to_float32


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, W and the moments of a layer whose spectrum falls by a factor of a thousand."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(320, 320, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(512, 512, generator=generator)).Q
    weight = u * torch.logspace(0, -3, 320) @ v[:, :320].T
    x = torch.randn(600, 512, generator=generator)
    return x, weight, (x.T @ x).double()


def test_even_scales_are_the_least_product_of_sums() -> None:
    b = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 0.1, 0.01])
    squares = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)

    def cost(d: Tensor) -> float:
        sizes = b.double().norm(dim=0) / d
        return float(sizes.square().sum() * (squares * d * d).sum())

    d = even_scales(b, squares)
    least = float((b.double().norm(dim=0) * squares.sqrt()).sum() ** 2)
    assert cost(d) == np.float64(least).item() or abs(cost(d) / least - 1) < 1e-12
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        assert cost(d * torch.rand(3, generator=generator).double().add(0.5)) >= least * (1 - 1e-12)


def test_dead_components_keep_their_scale() -> None:
    b = torch.tensor([[1.0, 0.0, 2.0]])
    assert even_scales(b, torch.tensor([0.0, 1.0, 4.0])).tolist() == [1.0, 1.0, 1.0]
    a, second = evened(torch.ones(3, 2), b, torch.tensor([0.0, 1.0, 1.0]))
    assert torch.isfinite(a).all()
    assert torch.isfinite(second).all()


def test_the_product_stays_at_every_rank() -> None:
    _, weight, h = example()
    found = decompose([weight[:200], weight[200:]], h)
    even = in_even_gauge(found, h)
    assert torch.equal(even.energies, found.energies)
    for rank in (1, 32, 320):
        one, two = found.pair(rank).dense(), even.pair(rank).dense()
        assert float((one - two).norm() / one.norm()) < 1e-6
    squares = ((even.a.double() @ h) * even.a.double()).sum(dim=1)
    ratio = even.b.double().norm(dim=0) / squares.sqrt()
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-5)


def test_less_is_lost_to_eight_bit_activations_and_small_types() -> None:
    x, weight, h = example()
    found = decompose([weight], h).pair(256)  # m < n: A x falls like the spectrum, B does not

    def error(a: Tensor, b: Tensor, kind: str) -> float:
        inner = x @ a.T
        scale = inner.abs().amax(dim=1, keepdim=True) / 127  # as ggml's Q8_K: 256 share a scale
        rounded = (inner / scale).round() * scale
        held = torch.from_numpy(to_float32(quantize(b.numpy(), kind), kind).copy())
        exact = inner @ b.T
        return float((rounded @ held.T - exact).square().sum() / exact.square().sum())

    squares = ((found.a.double() @ h) * found.a.double()).sum(dim=1)
    for kind in ("Q6_K", "Q4_K", "Q2_K"):
        made = error(found.a, found.b, kind)
        even = evened(found.a, found.b, squares)
        assert error(*even, kind) < made
        assert error(*mixed(*even), kind) < 0.6 * made


def test_mixing_is_orthogonal_and_spreads_what_components_hold() -> None:
    assert torch.allclose(hadamard(64) @ hadamard(64), torch.eye(64).double())
    generator = torch.Generator().manual_seed(3)
    for rank in (1, 96, 100, 512):
        a = torch.randn(rank, 40, generator=generator) * torch.logspace(0, -2, rank)[:, None]
        b = torch.randn(30, rank, generator=generator)
        one, two = mixed(a, b)
        assert one.shape == a.shape
        assert two.shape == b.shape
        assert float((two @ one - b @ a).norm() / (b @ a).norm()) < 1e-6
    orthogonal = torch.linalg.qr(torch.randn(600, 512, generator=generator)).Q.T
    a = orthogonal * torch.logspace(0, -2, 512)[:, None]  # uncorrelated for H = I
    squares = mixed(a, torch.ones(1, 512))[0].double().square().sum(dim=1)
    assert torch.allclose(squares.float(), mixed_squares(a.square().sum(dim=1)), rtol=1e-4)
    assert float(squares.max() / squares.min()) < 1.1
