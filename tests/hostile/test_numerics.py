"""Rows 16 and 17, and other numerical trouble: finite factors that are as good as theory allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from svdexport.allocate import STRATEGIES, Candidate
from svdexport.core.decompose import Decomposition, damped_cholesky, decompose, fit
from svdexport.core.lowrank import break_even_rank
from svdexport.recipe.settings import NO_SETTINGS

SHAPES = {"wide": (24, 40), "tall": (40, 24)}


def inputs(trouble: str, n: int, generator: torch.Generator) -> Tensor:
    """Calibration inputs X (n, tokens) with the trouble named."""
    x = torch.randn(n, 8 * n, generator=generator, dtype=torch.float64)
    if trouble == "few tokens":
        x = x[:, : n // 3]
    elif trouble == "one token":
        x = x[:, :1]
    elif trouble == "dead channel":
        x[3] = 0.0
    elif trouble == "duplicate channels":
        x[5] = x[6]
    elif trouble == "near singular":
        x = torch.linalg.qr(x[:, :n])[0] * torch.logspace(0, -7, n, dtype=torch.float64)
    elif trouble == "outlier channel":
        x[2] *= 1e4
    elif trouble == "no signal":
        x = torch.zeros_like(x)
    return x


def root(moment: Tensor) -> Tensor:
    """The symmetric square root, by definition, in float64."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def errors(
    weight: Tensor, moment: Tensor, metric: Tensor, found: Decomposition, ranks: Sequence[int]
) -> list[tuple[float, float]]:
    """For each rank the error ||G^1/2 (W - B A) H^1/2|| reached, and the least there is."""
    left, right = root(metric), root(moment)
    best = torch.linalg.svdvals(left @ weight @ right)
    pairs = []
    for rank in ranks:
        gap = weight - found.b[:, :rank].double() @ found.a[:rank].double()
        reached = torch.linalg.norm(left @ gap @ right)
        pairs.append((float(reached), float(best[rank:].square().sum().sqrt())))
    return pairs


TROUBLES = [
    "none",
    "few tokens",
    "one token",
    "dead channel",
    "duplicate channels",
    "near singular",
    "outlier channel",
    "no signal",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["identity", "fisher", "singular fisher"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_row_16_singular_moments_are_damped_and_the_result_is_near_the_optimum(
    trouble: str, metric: str, shape: str
) -> None:
    m, n = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = inputs(trouble, n, generator)
    moment = x @ x.T
    gradients, exact = None, torch.eye(m, dtype=torch.float64)
    if metric != "identity":
        tokens = 5 if metric == "singular fisher" else 4 * m
        g = torch.randn(m, tokens, generator=generator, dtype=torch.float64)
        gradients = [g @ g.T]
        # The stated damping is part of the problem that is solved.
        exact = gradients[0] + 0.1 * gradients[0].diagonal().mean() * exact
    found = decompose([weight], moment, gradients)
    for tensor in (found.a, found.b, found.energies):
        assert torch.isfinite(tensor).all()
    assert found.damping <= 1e-3 or trouble == "no signal"
    total = float(torch.linalg.norm(root(exact) @ weight @ root(moment)))
    for reached, best in errors(weight, moment, exact, found, (1, 4, 8, 16)):
        assert reached <= 1.01 * best + 2e-3 * total + 1e-12


def test_row_16_a_layer_of_zeros() -> None:
    x = torch.randn(24, 100, dtype=torch.float64)
    found = decompose([torch.zeros(40, 24)], x @ x.T)
    assert torch.isfinite(found.a).all()
    assert torch.equal(found.b @ found.a, torch.zeros(40, 24))
    assert float(fit([torch.zeros(40, 24)], found, x @ x.T).errors.max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_lose_nothing_on_the_way(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 24, generator=generator).to(dtype)
    x = torch.randn(24, 200, generator=generator, dtype=torch.float64)
    found = decompose([weight], x @ x.T)
    same = decompose([weight.double()], x @ x.T)
    assert torch.equal(found.a, same.a)
    full = found.b.double() @ found.a.double()
    assert torch.allclose(full, weight.double(), atol=1e-4)


def test_a_moment_that_is_not_finite_is_refused_by_name() -> None:
    moment = torch.eye(8, dtype=torch.float64)
    moment[2, 2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        damped_cholesky(moment, 1e-6)


def test_the_damping_that_was_needed_is_reported() -> None:
    _, given = damped_cholesky(torch.ones(8, 8, dtype=torch.float64), 0.0)
    assert given > 0.0
    negative = torch.eye(8, dtype=torch.float64)
    negative[0, 0] = -1e-3
    factor, needed = damped_cholesky(negative, 1e-6)
    assert 1e-3 < needed <= 1e-1
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("strategy", ["uniform", "greedy", "svd_llm_v2"])
def test_row_17_past_break_even_stays_dense_and_says_why(strategy: str) -> None:
    small = Candidate("small", 24, 40, np.ones(24))
    large = Candidate("large", 640, 640, np.linspace(2, 1, 640))
    assert break_even_rank(24, 40) < 32
    chosen = STRATEGIES[strategy].allocate([small, large], 0.7, 32, NO_SETTINGS)
    assert chosen["small"].rank is None
    assert "break-even" in chosen["small"].reason
    rank = chosen["large"].rank
    assert rank is not None
    assert rank % 32 == 0
    assert large.cost(rank) < large.dense_params
    whole = STRATEGIES[strategy].allocate([large], 1.0, 32, NO_SETTINGS)["large"]
    assert whole.rank is None
    assert whole.reason
