"""Float32 matrix products on a CPU, by the oneDNN that torch carries.

torch sends float32 products to the BLAS it was built with. For x86 that is MKL, whose choice of
kernels goes by the maker of the processor: on an AMD EPYC with AVX-512 it does 104 GFLOP/s a core
where oneDNN, which goes by the instructions, does 200 to 240. No other processor was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 2**22  # multiplications: below, what a call costs outweighs the kernel
_MM, _ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


def has_onednn() -> bool:
    """Whether this torch brings oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN; it reads whole rows, so that a strided operand is copied first."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.contiguous(), bias, "none", [], ""
    )
    return result


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply x (rows, n) by the transpose of weight (m, n)."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.shape[0] * x.shape[1] * weight.shape[0] >= SMALLEST
        and has_onednn()
    )


def times_transposed(x: Tensor, y: Tensor) -> Tensor:
    """x y^T, (rows, m), for x (rows, n) and y (m, n)."""
    return _linear(x, y) if _suits(x, y) else x @ y.T


class _Onednn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends torch's own large float32 products, those of a backward pass among them, to oneDNN."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _MM and _suits(args[0], args[1].T):
            return _linear(args[0], args[1].T)
        if func is _ADDMM and not kwargs and args[0].dim() == 1 and _suits(args[1], args[2].T):
            return _linear(args[1], args[2].T, args[0])
        return func(*args, **(kwargs or {}))


def float32_products() -> contextlib.AbstractContextManager[Any]:
    """Inside, large float32 products of any torch code run on oneDNN, where there is one."""
    return _Onednn() if has_onednn() else contextlib.nullcontext()  # type: ignore[no-untyped-call]
