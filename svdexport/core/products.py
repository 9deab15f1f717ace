"""Large matrix products and eigenproblems on a CPU, by the fastest library at hand.

torch sends them to the BLAS it was built with. For x86 that is MKL, whose choice of kernels goes by
the maker of the processor: on an AMD EPYC with AVX-512 it does 104 GFLOP/s a core in float32 where
the oneDNN that torch carries, which goes by the instructions, does 200 to 240, and 57 in float64
where the OpenBLAS that scipy carries does 104. No other processor was measured.

What scipy writes to stands in torch's memory: the first touch of as much in numpy's costs up to ten
times a copy of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdexport.core.machine import made_by_intel

SMALLEST = 2**22  # multiplications: below, what a call costs outweighs the kernel
# Multiplications in float64: for some milliseconds after a product the threads of one library get
# into the way of the other's.
SMALLEST_DOUBLE = 2**32
_BLOCK = 256  # columns: products of that width run at full speed
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


@functools.cache
def _openblas() -> ThreadpoolController | None:
    """scipy's OpenBLAS, where it has float64 kernels that torch's MKL keeps for Intel's own."""
    if not torch.backends.mkl.is_available() or made_by_intel():  # type: ignore[no-untyped-call]
        return None
    found = ThreadpoolController().select(internal_api="openblas")
    return found if found.lib_controllers else None


@contextlib.contextmanager
def _scipy_for(multiplications: int, *operands: Tensor) -> Iterator[bool]:
    """Whether scipy is to do so many multiplications; inside it has as many threads as torch."""
    blas = None
    if multiplications >= SMALLEST_DOUBLE and all(
        x.dtype == operands[0].dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and not x.requires_grad
        for x in operands
    ):
        blas = _openblas()
    if blas is None:
        yield False
        return
    with blas.limit(limits=torch.get_num_threads()):
        yield True


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x y, (m, k), for x (m, n) and y (n, k)."""
    with _scipy_for(x.shape[0] * x.shape[1] * y.shape[1], x, y) as by_scipy:
        if not by_scipy:
            return x @ y
        # BLAS counts columns first, so that it is given, and gives, the transposes
        (left, turn_left), (right, turn_right) = _by_columns(y.T), _by_columns(x.T)
        product = torch.empty((x.shape[0], y.shape[1]), dtype=x.dtype)
        turned = {"trans_a": turn_left, "trans_b": turn_right}
        gemm, out = _blas("gemm", x), product.numpy().T
        return torch.from_numpy(gemm(1.0, left, right, c=out, overwrite_c=True, **turned).T)


def _blas(name: str, x: Tensor) -> Callable[..., Any]:
    """scipy's BLAS function of that name, for the type of x."""
    found: Callable[..., Any] = scipy.linalg.get_blas_funcs(name, dtype=x.numpy().dtype)
    return found


def _by_columns(x: Tensor) -> tuple[Any, bool]:
    """x as an array in order of columns, without a copy where it can be, and whether transposed."""
    if x.is_contiguous():
        return x.numpy().T, True
    return x.T.contiguous().numpy().T, False


def times_lower(x: Tensor, h: Tensor) -> Tensor:
    """x L, (m, n), for x (m, n) and a symmetric h = L + L^T (n, n): L is lower triangular, but for
    blocks on its diagonal that may hold half of h's."""
    with _scipy_for(x.shape[0] * x.shape[1] * x.shape[1], x, h) as by_scipy:
        if not by_scipy:
            return _times_lower_in_blocks(x, h)
        # of h's transpose the upper triangle, on the left of that of x; the whole diagonal
        turned, trmm = x.clone(memory_format=torch.contiguous_format).numpy().T, _blas("trmm", x)
        product = torch.from_numpy(trmm(1.0, h.contiguous().numpy().T, turned, overwrite_b=True).T)
    return product.addcmul_(x, h.diagonal(), value=-0.5)


def _times_lower_in_blocks(x: Tensor, h: Tensor) -> Tensor:
    """Zeros of L are left out in blocks of columns; inside of one on the diagonal h / 2 does."""
    product, size = torch.empty_like(x), x.shape[1]
    width = max(_BLOCK, size // 10)  # wider blocks do more of the zeros, but run faster
    for start in range(0, size, width):
        part = slice(start, start + width)
        lower = h[start:, part].clone()
        lower[:width] /= 2
        product[:, part] = x[:, start:] @ lower
    return product


def eigh(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, of a symmetric matrix (n, n), and the eigenvectors (n, count)
    of the ``count`` largest in the same order; None: all.

    Raises LinAlgError, torch's or scipy's, where no convergence is reached.
    """
    size = len(matrix)
    count = size if count is None else count
    with _scipy_for(size**3, matrix) as by_scipy:
        if not by_scipy:
            values, vectors = torch.linalg.eigh(matrix)
            return values, vectors[:, size - count :]
        if hasattr(scipy.linalg.lapack, "dstevd"):  # from scipy 1.16 on
            return _eigh_in_steps(matrix, count)
        turned = matrix.clone(memory_format=torch.contiguous_format).numpy().T
        found = scipy.linalg.eigh(turned, driver="evd", check_finite=False, overwrite_a=True)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])[:, size - count :]


def _eigh_in_steps(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The three steps of LAPACK's syevd, to turn back no vector but those that are wanted:
    Q^T M Q is tridiagonal, and of its eigenvectors V the last ``count`` are taken to Q V."""
    size, inside = len(matrix), matrix.clone(memory_format=torch.contiguous_format).numpy().T
    reduce, solve, turn = (_lapack(name, inside) for name in ("sytrd", "stevd", "ormqr"))
    length = int(_lapack("sytrd_lwork", inside)(size, lower=1)[0])
    inside, diagonal, beside, scales, _ = reduce(inside, lower=1, lwork=length, overwrite_a=1)
    values, vectors, info = solve(diagonal, beside)
    if info:
        raise scipy.linalg.LinAlgError("an eigenproblem does not converge")
    # Q leaves the first coordinate alone: its column i of reflections begins in row i + 1
    found = torch.from_numpy(vectors.T)[size - count :].clone()
    del vectors
    reflections = torch.from_numpy(inside.T)[:-1, 1:].contiguous().numpy().T
    del inside
    rest = found[:, 1:].contiguous().numpy().T
    length = 64 * (count + 65)  # enough for the largest block of any LAPACK
    rest, _, _ = turn("L", "N", reflections, scales, rest, length, overwrite_c=1)
    found[:, 1:] = torch.from_numpy(rest.T)
    return torch.from_numpy(values), found.T


def _lapack(name: str, x: Any) -> Callable[..., Any]:
    """scipy's LAPACK function of that name, for the type of an array."""
    found: Callable[..., Any] = scipy.linalg.get_lapack_funcs(name, dtype=x.dtype)
    return found
