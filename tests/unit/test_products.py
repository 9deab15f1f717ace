"""Products in float32 by oneDNN, in float64 by scipy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from svdexport.core import products
from svdexport.core.products import (
    eigh,
    float32_products,
    has_onednn,
    multiply,
    times_lower,
    times_transposed,
)

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN was given; none is too small."""
    seen: list[tuple[int, ...]] = []
    linear = products._linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*x.shape, weight.shape[0]))
        return linear(x, weight, bias)

    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "_linear", noted)
    return seen


@needs_onednn
@pytest.mark.parametrize("strided", [False, True])
def test_a_product_is_the_float64_one(counted: list[tuple[int, ...]], strided: bool) -> None:
    x, y = normal(37, 130, seed=1), normal(61, 130, seed=2)
    if strided:
        x, y = normal(130, 37, seed=1).T[:, ::2], normal(130, 61, seed=2).T[:, ::2]
    found = times_transposed(x, y)
    torch.testing.assert_close(found.double(), x.double() @ y.double().T, rtol=1e-5, atol=1e-4)
    assert counted == [(37, x.shape[1], 61)]


def test_a_product_in_float64_stays_there(counted: list[tuple[int, ...]]) -> None:
    x, y = normal(9, 16).double(), normal(7, 16).double()
    assert torch.equal(times_transposed(x, y), x @ y.T)
    assert not counted


@needs_onednn
def test_a_models_products_and_its_gradients_go_there(counted: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))
    x = normal(2, 33, 24).requires_grad_(True)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))

    plain = gradients()
    assert not counted
    with float32_products():
        found = gradients()
    assert len(counted) == 6  # forward, and both gradients of each layer
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    counted.clear()
    gradients()
    assert not counted


@needs_onednn
def test_other_types_pass_by(counted: list[tuple[int, ...]]) -> None:
    with float32_products(), torch.autocast("cpu", torch.bfloat16):
        out = nn.Linear(16, 16)(normal(8, 16))
    assert out.dtype == torch.bfloat16
    assert not counted


@pytest.fixture
def by_scipy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads of scipy's BLAS in each product that scipy was given; none is too small."""
    seen: list[int] = []
    blas = ThreadpoolController().select(internal_api="openblas")
    if not blas.lib_controllers:
        pytest.skip("this scipy has no OpenBLAS")

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            threads = {library["num_threads"] for library in blas.info()}
            assert len(threads) == 1
            seen.extend(threads)
            return function(*args, **options)

        return noted

    named, lapack = products._blas, products._lapack
    monkeypatch.setattr(products, "SMALLEST_DOUBLE", 1)
    monkeypatch.setattr(products, "_openblas", lambda: blas)
    monkeypatch.setattr(products, "_blas", lambda name, x: noting(named(name, x)))
    monkeypatch.setattr(products, "_lapack", lambda name, x: noting(lapack(name, x)))
    monkeypatch.setattr(scipy.linalg, "eigh", noting(scipy.linalg.eigh))
    return seen


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.T.contiguous().T,
    lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    lambda x: x.repeat_interleave(2, dim=0)[::2],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_scipy_multiplies(
    by_scipy: list[int],
    left: Callable[[Tensor], Tensor],
    right: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    x, y = normal(37, 130, seed=1).to(dtype), normal(130, 61, seed=2).to(dtype)
    found = multiply(left(x), right(y))
    assert found.dtype == dtype
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), x.double() @ y.double(), rtol=0, atol=bound)
    assert len(by_scipy) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37, 130), (130, 37), (1, 1), (9, 600)])
def test_times_the_lower_half(
    by_scipy: list[int], layout: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    x, other = normal(*shape).double(), normal(shape[1], shape[1], seed=3).double()
    h = layout(other + other.T)
    given = h.clone(), x.clone()
    whole = x @ h @ x.T
    by_blas = times_lower(layout(x), h)
    expected = x @ (h.tril(-1) + torch.diag(h.diagonal() / 2))
    torch.testing.assert_close(by_blas, expected, rtol=0, atol=1e-11)
    assert len(by_scipy) == 1
    products.SMALLEST_DOUBLE = x.numel() * shape[1] + 1  # restored by the fixture
    in_blocks = times_lower(layout(x), h)
    assert len(by_scipy) == 1
    for half in (by_blas, in_blocks):
        torch.testing.assert_close(half @ x.T + x @ half.T, whole, rtol=0, atol=1e-10)
    assert torch.equal(h, given[0])
    assert torch.equal(x, given[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("count", [None, 40, 17, 1])
def test_scipy_solves_a_float64_eigenproblem(
    by_scipy: list[int],
    monkeypatch: pytest.MonkeyPatch,
    layout: Callable[[Tensor], Tensor],
    older: bool,
    count: int | None,
) -> None:
    if older:
        monkeypatch.delattr(scipy.linalg.lapack, "dstevd", raising=False)
    elif not hasattr(scipy.linalg.lapack, "dstevd"):
        pytest.skip("an older scipy")
    x = normal(40, 40).double()
    matrix = layout(x @ x.T)
    given, kept = matrix.clone(), 40 if count is None else count
    values, vectors = eigh(matrix, count)
    assert len(by_scipy) == (1 if older else 4)
    assert vectors.shape == (40, kept)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(matrix @ vectors, vectors * values[40 - kept :])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(kept, dtype=torch.float64))
    assert torch.equal(matrix, given)


@pytest.mark.parametrize("rows", [2, 3, 70])
def test_eigenvectors_where_eigenvalues_are_equal(by_scipy: list[int], rows: int) -> None:
    for matrix in (torch.eye(rows), torch.zeros(rows, rows), torch.ones(rows, rows)):
        values, vectors = eigh(matrix.double())
        torch.testing.assert_close(vectors @ (values[:, None] * vectors.T), matrix.double())
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(rows, dtype=torch.float64))
    assert by_scipy


@pytest.mark.parametrize("threads", [1, 2])
def test_scipy_has_as_many_threads_as_torch(by_scipy: list[int], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        multiply(normal(9, 16).double(), normal(16, 7).double())
    finally:
        torch.set_num_threads(before)
    assert by_scipy == [threads]


def test_scipy_is_left_alone_for_other_products(by_scipy: list[int]) -> None:
    x, y = normal(9, 16), normal(16, 7)
    assert torch.equal(multiply(x.bfloat16(), y.bfloat16()), x.bfloat16() @ y.bfloat16())
    grown = x.clone().requires_grad_(True)
    assert multiply(grown, y).requires_grad
    products.SMALLEST_DOUBLE = 9 * 16 * 7 + 1  # restored by the fixture
    assert torch.equal(multiply(x.double(), y.double()), x.double() @ y.double())
    assert not by_scipy


def test_intels_own_processors_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "made_by_intel", lambda: True)
    assert products._openblas.__wrapped__() is None


CHURN = """
import resource, sys, torch
from svdexport.core.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def churn():
    parts = [torch.ones(6 << 18) for _ in range(6)]  # 6 MB each
for _ in range(5):  # until the heap has grown to what it needs
    churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_not_zeroed_again() -> None:
    # Held at its default: left alone, glibc sometimes moves its threshold far enough by itself.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", CHURN, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return int(done.stdout)

    assert faults("keep") < faults("as it is") / 10
