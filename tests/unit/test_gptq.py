from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from svdexport.core.gptq import (
    GptqConfig,
    gptq,
    gptq_pair,
    relative_error,
    round_to_nearest,
)
from svdexport.core.grids import Grid, Steps
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.grids_onnx import NBitsGrid, dequantize
from svdexport.core.grids_onnx import from_codes as nbits_from_codes
from svdexport.core.lowrank import FactorPair
from svdexport.runtimes.ggml import quantize as ggml_quantize

ORDERS = ["activation", "natural"]


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the moment of inputs that mix a few directions, as a layer's do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.7
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = (inputs * spectrum) @ torch.linalg.qr(mix)[0]
    inputs *= 1.0 + 3.0 * torch.rand(columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def slow_gptq(
    weight: Tensor, moment: Tensor, steps: Steps, order: Tensor, damping: float
) -> Tensor:
    """The textbook loop with the inverse Hessian, one column at a time, in float64: codes."""
    n = weight.shape[1]
    h = moment + damping * moment.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    w = weight.double().clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    left = order.tolist()
    while left:
        column = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        full = w.float().clone()
        code = steps.codes(full)[:, column]
        codes[:, column] = code
        value = steps.values(codes)[:, column].double()
        error = (w[:, column] - value) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0][None, :]
        left = left[1:]
    return codes


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q4_K", "Q3_K"])
def test_error_feedback_equals_the_slow_loop(name: str) -> None:
    weight, moment = correlated(6, 256)
    config = GptqConfig(sweeps=0)
    found = gptq(weight.double(), moment, GRIDS[name], config)
    steps = GRIDS[name].steps(found.scales)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    codes = slow_gptq(weight, moment, steps, order, config.damping)
    assert (codes != found.codes).float().mean() < 1e-3  # ties alone
    fast = gptq(weight, moment, GRIDS[name], config)
    assert (fast.codes != found.codes).float().mean() < 0.02


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"])
def test_layer_error_is_below_rounding_and_below_ggml(name: str, order: str) -> None:
    weight, moment = correlated(48, 512)
    grid = GRIDS[name]
    found = gptq(weight, moment, grid, GptqConfig(order=order))  # type: ignore[arg-type]
    importance = (moment.diagonal() / moment.diagonal().mean()).float().numpy()
    packed = ggml_quantize(weight.numpy(), name, importance)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    nearest = round_to_nearest(weight, moment, grid)
    assert found.error < 0.8 * nearest.error
    assert found.error < 0.8 * relative_error(weight, torch.from_numpy(theirs), moment)
    read = gguf.quants.dequantize(
        grid.pack(found.codes, found.scales).numpy(), gguf.GGMLQuantizationType[name]
    )
    np.testing.assert_array_equal(read, found.values.numpy())


def test_without_a_moment_the_error_is_that_of_the_values() -> None:
    weight, _ = correlated(24, 96)
    found = round_to_nearest(weight, None, GRIDS["Q4_0"])
    squares = (weight.double() - found.values.double()).square().sum()
    assert found.error == pytest.approx(float(squares / weight.double().square().sum()), rel=1e-12)
    assert found.error == relative_error(weight, found.values, torch.eye(96))


def test_sweeps_never_raise_the_damped_error() -> None:
    weight, moment = correlated(16, 320)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(320)
    errors = [
        relative_error(
            weight, gptq(weight, moment, GRIDS["Q4_0"], GptqConfig(0.01, sweeps=n)).values, damped
        )
        for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("grid", [GRIDS["Q4_0"], GRIDS["IQ4_NL"], NBitsGrid(4, 32, False)])
def test_after_many_sweeps_no_change_of_one_code_lowers_the_damped_error(grid: Grid) -> None:
    weight, moment = correlated(4, 160)  # more columns than a sweep takes at a time
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(160)
    found = gptq(weight.double(), moment, grid, GptqConfig(0.01, sweeps=50))
    steps = grid.steps(found.scales)
    assert torch.equal(steps.values(found.codes), found.values)
    at_code = [steps.values(torch.full_like(found.codes, code)) for code in range(16)]
    for row in range(4):
        rest = weight[row].double() - found.values[row].double()
        error = float(rest @ damped @ rest)
        for values in at_code:
            changed = rest.repeat(160, 1)  # row k: the code of column k alone is another
            changed.diagonal().copy_(weight[row].double() - values[row].double())
            others = ((changed @ damped) * changed).sum(dim=1)
            assert float(others.min()) >= error * (1 - 1e-5)


def test_singular_moments_are_damped_and_the_damping_recorded() -> None:
    weight, _ = correlated(8, 64)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = gptq(weight, x.T @ x, GRIDS["Q4_0"], GptqConfig(damping=0.0))
    assert found.damping > 0.0
    assert found.error < 1e-2
    dead = gptq(weight, torch.zeros(64, 64), GRIDS["Q4_0"], GptqConfig())
    assert (dead.values - weight).norm() < 0.15 * weight.norm()


def test_a_pair_gains_from_b_knowing_the_rounded_a() -> None:
    weight, moment = correlated(96, 128)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    pair = FactorPair(v[:64], u[:, :64] * s[:64])
    grid = GRIDS["Q4_0"]
    first, second = gptq_pair(pair, moment, grid, grid, GptqConfig())
    product = second.values @ first.values
    plain = [round_to_nearest(x, None, grid).values for x in (pair.b, pair.a)]
    target = pair.dense()
    assert relative_error(target, product, moment) < 0.5 * relative_error(
        target, plain[0] @ plain[1], moment
    )
    # the same, but for a B that is not fitted again to the rounded A
    norm = pair.b.norm(dim=0)  # which A's rows have taken from B's columns
    inner = first.values.double() @ moment @ first.values.double().T
    alone = gptq(pair.b / norm, inner, grid, GptqConfig()).values @ first.values
    assert relative_error(target, product, moment) < 0.9 * relative_error(target, alone, moment)


@pytest.mark.parametrize("given", [False, True])
def test_a_pairs_b_is_fitted_to_the_rounded_a(given: bool) -> None:
    """B = argmin ||(T - B Q(A)) H^1/2||, T the target or B A, and rounded in its own metric."""
    weight, moment = correlated(48, 64)
    generator = torch.Generator().manual_seed(3)
    pair = FactorPair(torch.randn(16, 64, generator=generator), weight[:, :16].contiguous())
    target = None
    if given:
        noise = torch.randn(48, 64, generator=generator, dtype=torch.float64)
        target = weight.double() + 0.1 * noise
    grid_a, grid_b = NBitsGrid(4, 16, True), NBitsGrid(8, 16, True)
    first, second = gptq_pair(pair, moment, grid_a, grid_b, GptqConfig(), target)
    root = torch.linalg.cholesky(moment)
    seen = first.values.double() @ root
    aim = (pair.b.double() @ pair.a.double() if target is None else target) @ root
    best = torch.linalg.lstsq(seen.T, aim.T).solution.T
    expected = gptq(best.float(), seen @ seen.T, grid_b, GptqConfig())
    # all codes of a row, but where a tie is broken the other way
    same = (second.codes == expected.codes).all(dim=1)
    assert float(same.float().mean()) > 0.95
    assert torch.allclose(second.values, expected.values, atol=1.01 * float(best.abs().max() / 127))
    # another B than the pair's own in the scale of A's rows
    own = pair.b / pair.b.norm(dim=0)
    assert float((best.float() - own).abs().max()) > 3 * float(best.abs().max() / 127)


def test_a_pairs_b_is_fitted_to_another_target_than_its_own_product() -> None:
    """B = argmin ||T X - B Q(A) X||, by least squares over the inputs themselves."""
    weight, _ = correlated(48, 64)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, 400, generator=generator, dtype=torch.float64)
    moment = inputs @ inputs.T
    pair = FactorPair(torch.randn(16, 64, generator=generator), weight[:, :16].contiguous())
    target = weight.double() + 0.1 * torch.randn(48, 64, generator=generator, dtype=torch.float64)
    grid = NBitsGrid(8, 16, True)
    first, second = gptq_pair(pair, moment, grid, grid, GptqConfig(), target)
    seen = first.values.double() @ inputs
    best = torch.linalg.lstsq(seen.T, (target @ inputs).T).solution.T
    step = best.abs().max() / 127
    assert (second.values.double() - best).abs().max() < 2 * step
    own = best - pair.b.double()
    assert own.abs().max() > 20 * step  # it is not the pair's own B that was rounded


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_grids_with_rows_that_do_not_fill_a_block(bits: int, symmetric: bool) -> None:
    weight, moment = correlated(24, 200)
    grid = NBitsGrid(bits, 32, symmetric)
    found = gptq(weight, moment, grid, GptqConfig())
    tensor = nbits_from_codes(found.codes, found.scales, 200, grid)
    np.testing.assert_array_equal(dequantize(tensor), found.values.numpy())
    assert found.error < round_to_nearest(weight, moment, grid).error


def test_natural_order_searches_the_scales_that_the_published_loop_searches() -> None:
    """Frantar et al.'s own form: the inverse's Cholesky factor, all later columns updated."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 64, generator=generator).double()
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    moment = (x.T @ x).double()
    grid = NBitsGrid(2, 32, False)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work, expected = weight.clone(), torch.zeros_like(weight)
    for k in range(64):
        if k % 32 == 0:
            importance = 1 / upper.diagonal()[k : k + 32].square()
            steps = grid.steps(grid.search(work[:, k : k + 32].float(), importance.float()))
        code = (work[:, k : k + 1] * steps.inverse() + steps.zero).round()
        code = code.clamp(steps.low, steps.high)
        expected[:, k] = ((code - steps.zero) * steps.scale)[:, 0]
        error = (work[:, k] - expected[:, k]) / upper[k, k]
        work[:, k:] -= error[:, None] * upper[k, k:]
    found = gptq(weight, moment, grid, GptqConfig(0.01, "natural", 0))
    same = (found.values.double() - expected).abs() < 1e-5
    assert float(same.double().mean()) > 0.99
