"""Products in float32 by oneDNN."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from svdexport.core import products
from svdexport.core.products import float32_products, has_onednn, times_transposed

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
