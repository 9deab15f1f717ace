"""Products in float32 by oneDNN, in float64 by numpy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from svdexport.core import products
from svdexport.core.products import eigh, float32_products, has_onednn, multiply, times_transposed

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
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads of numpy's BLAS in each float64 product that numpy was given; none is too small."""
    seen: list[int] = []
    blas = ThreadpoolController().select(internal_api="openblas")
    if not blas.lib_controllers:
        pytest.skip("this numpy has no OpenBLAS")

    def noted(result: Any) -> Any:
        seen.extend(library["num_threads"] for library in blas.info())
        return result

    matmul, numpy_eigh = np.matmul, np.linalg.eigh
    monkeypatch.setattr(products, "SMALLEST_DOUBLE", 1)
    monkeypatch.setattr(products, "_openblas", lambda: blas)
    monkeypatch.setattr(np, "matmul", lambda *a, **k: noted(matmul(*a, **k)))
    monkeypatch.setattr(np.linalg, "eigh", lambda x: noted(numpy_eigh(x)))
    return seen


@pytest.mark.parametrize("strided", [False, True])
def test_numpy_multiplies_in_float64(by_numpy: list[int], strided: bool) -> None:
    x, y = normal(37, 130, seed=1).double(), normal(130, 61, seed=2).double()
    whole = torch.full((37, 90), 7.0, dtype=torch.float64)
    out = whole[:, 4:65]
    if strided:
        x, y = normal(130, 37, seed=1).double().T, normal(61, 130, seed=2).double().T
    expected = x @ y
    torch.testing.assert_close(multiply(x, y), expected, rtol=1e-13, atol=1e-12)
    assert multiply(x, y, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-12)
    assert (whole[:, :4] == 7).all() and (whole[:, 65:] == 7).all()
    assert len(by_numpy) == 2


def test_numpy_solves_a_float64_eigenproblem(by_numpy: list[int]) -> None:
    x = normal(40, 40).double()
    matrix = x @ x.T
    values, vectors = eigh(matrix)
    assert len(by_numpy) == 1
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(vectors @ (values[:, None] * vectors.T), matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
def test_numpy_has_as_many_threads_as_torch(by_numpy: list[int], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        multiply(normal(9, 16).double(), normal(16, 7).double())
    finally:
        torch.set_num_threads(before)
    assert by_numpy == [threads]


def test_numpy_is_left_alone_for_other_products(by_numpy: list[int]) -> None:
    x, y = normal(9, 16), normal(16, 7)
    assert torch.equal(multiply(x, y), x @ y)  # float32
    products.SMALLEST_DOUBLE = 9 * 16 * 7 + 1  # restored by the fixture
    assert torch.equal(multiply(x.double(), y.double()), x.double() @ y.double())
    assert not by_numpy


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
