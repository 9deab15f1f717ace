"""Statistics of activations and of output gradients, summed in float64 over calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdexport.core.products import times_transposed
from svdexport.core.ranks import Ranks

# What a method or an allocation strategy may ask calibration for:
#   inputs      H = sum of x x^T (n, n)          gradients   G = sum of g g^T (m, m)
#   mean_abs    mean of |x| (n,)                 fisher      sum over samples of (dL/dW)^2 (m, n)
#   rows        the first of the rows x themselves (count, n)
#   similarity  mean cosine of a block's input and output
#   sampled_gradients  G of the loss for tokens drawn from the model's own prediction (m, m)
Statistic = Literal[
    "inputs", "gradients", "sampled_gradients", "mean_abs", "fisher", "rows", "similarity"
]
NEED_GRADIENTS: frozenset[Statistic] = frozenset({"gradients", "sampled_gradients", "fisher"})

_CHUNK = 2048  # rows per float32 product: keeps its rounding near 1e-6 of sqrt(H_ii H_jj)
_BLOCK = 192  # columns: narrower products lose more speed than they save work


def gram(x: Tensor) -> Tensor:
    """x^T x, (n, n), exactly symmetric, in x's own precision, at little more than half the cost."""
    result = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    add_upper(result, x)
    mirror(result)
    return result


def add_upper(matrix: Tensor, x: Tensor) -> None:
    """Add x^T x to ``matrix`` but for the blocks below its diagonal.

    A symmetric rank-k update by products: torch has no call for BLAS's own, and numpy's brings
    threads of its own, which get into the way of torch's.
    """
    columns = x.T.contiguous()
    for start in range(0, matrix.shape[0], _BLOCK):
        part = columns[start : start + _BLOCK]
        matrix[start : start + _BLOCK, start:] += times_transposed(part, columns[start:])


def mirror(matrix: Tensor) -> None:
    """Fill the blocks below the diagonal from those above it, and make the diagonal's symmetric."""
    for start in range(0, matrix.shape[0], _BLOCK):
        part, after = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        matrix[after, part] = matrix[part, after].T
        matrix[part, part] = (matrix[part, part] + matrix[part, part].T) / 2


def _add_product(matrix: Tensor, x: Tensor, y: Tensor) -> None:
    """matrix += x^T y, rows of the result one part after another: it may be a gigabyte."""
    for start in range(0, matrix.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        matrix[part] += x[:, part].T @ y


class Moment:
    """H = sum over rows x of x x^T, shape (n, n), float64.

    Products of at most 2,048 rows run in the rows' own precision (float32), which is twice as fast
    as float64; their sum is kept in float64, so the error does not grow with the number of rows.
    """

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros((size, size), dtype=torch.float64)
        self._whole = True  # whether the blocks below the diagonal are filled in
        self.rows = 0

    @property
    def matrix(self) -> Tensor:
        """The sum so far."""
        if not self._whole:
            mirror(self._sum)
            self._whole = True
        return self._sum

    @matrix.setter
    def matrix(self, value: Tensor) -> None:
        self._sum, self._whole = value, True

    def add(self, x: Tensor) -> None:
        """Add rows: x of shape (..., n)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        for chunk in torch.split(rows, _CHUNK):
            add_upper(self._sum, chunk)
        self._whole = False
        self.rows += rows.shape[0]

    def share(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have, on all of them."""
        ranks.sum(self._sum)
        self._whole = False
        self.rows = int(ranks.sum(torch.tensor(self.rows)))


def mean_shape(first: Tensor, second: Tensor) -> Tensor:
    """Mean of two second moments (m, m), each over its trace; the result has the first's trace."""
    trace = float(second.trace())
    if trace <= 0.0:
        return first
    return (first + second * (float(first.trace()) / trace)) / 2


@dataclass(frozen=True)
class CrossMoments:
    """Second moments of inputs x of the original model and x^ of the compressed one.

    Each (n, n), float64: original = sum x x^T, compressed = sum x^ x^^T, cross = sum x x^^T.
    """

    original: Tensor
    compressed: Tensor
    cross: Tensor

    @classmethod
    def of(cls, original: Sequence[Tensor], compressed: Sequence[Tensor]) -> CrossMoments:
        """From batches of rows, (rows, n) each, the same tokens in both."""
        size = original[0].shape[1]
        own, other = Moment(size), Moment(size)
        cross = torch.zeros((size, size), dtype=torch.float64)
        for x, y in zip(original, compressed, strict=True):
            own.add(x)
            other.add(y)
            for a, b in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True):
                _add_product(cross, a, b)
        return cls(own.matrix, other.matrix, cross)


class MeanAbs:
    """Mean of |x| over rows, shape (n,), float64."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows: x of shape (..., n)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.total += rows.abs().double().sum(dim=0)
        self.rows += rows.shape[0]

    def share(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have, on all of them."""
        ranks.sum(self.total)
        self.rows = int(ranks.sum(torch.tensor(self.rows)))

    def value(self) -> Tensor:
        """The mean, (n,)."""
        return self.total / max(1, self.rows)


class FirstRows:
    """The first ``count`` rows, as they come; ``sample`` is that of the rows that come next."""

    def __init__(self, count: int, width: int) -> None:
        self.width, self.sample = width, 0
        self.count, self.parts, self.rows = count, list[Tensor](), 0
        self._samples: list[int] = []  # of each row

    def add(self, x: Tensor) -> None:
        """Add rows: x of shape (..., n); beyond ``count`` they are passed over."""
        rows = x.detach().reshape(-1, x.shape[-1])[: self.count - self.rows]
        if len(rows):
            self.parts.append(rows.to(torch.float32, copy=True))
            self.rows += len(rows)
            self._samples += [self.sample] * len(rows)

    def take(self, parts: Sequence[Tensor]) -> None:
        """Hold the first of these rows instead of its own."""
        self.parts, self.rows, self._samples = [], 0, []
        for part in parts:
            self.add(part)

    def share(self, ranks: Ranks) -> None:
        """The first of all processes' rows in the order of the samples, on all of them."""
        if ranks.size == 1:
            return
        found = torch.zeros(ranks.size, self.count, dtype=torch.int64)  # sample + 1, 0: no row
        found[ranks.rank, : self.rows] = torch.tensor(self._samples, dtype=torch.int64) + 1
        samples = ranks.sum(found).flatten()
        empty = int((samples == 0).sum())
        order = samples.argsort(stable=True)[empty:][: self.count]
        rows = torch.zeros(len(order), self.width)
        mine = order // self.count == ranks.rank
        if self.parts:
            rows[mine] = self.value()[order[mine] % self.count]
        self.parts, self.rows = [ranks.sum(rows)], len(order)

    def value(self) -> Tensor:
        """The rows, (rows, n)."""
        return torch.cat(self.parts)


class MeanCosine:
    """Mean over rows of the cosine between two tensors of the same shape (..., n)."""

    def __init__(self) -> None:
        self.total, self.rows = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows; a zero row counts as cosine 0."""
        cosines = torch.nn.functional.cosine_similarity(x.detach(), y.detach(), dim=-1)
        self.total += float(cosines.double().sum())
        self.rows += cosines.numel()

    def share(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have, on all of them."""
        sums = ranks.sum(torch.tensor([self.total, self.rows], dtype=torch.float64))
        self.total, self.rows = float(sums[0]), int(sums[1])

    def value(self) -> float:
        """The mean."""
        return self.total / max(1, self.rows)


class Fisher:
    """Empirical Fisher information of a weight: sum over samples of (dL/dW)^2, (m, n), float64.

    A sample is one calibration sequence, or what of a batch goes to one expert; its gradient is the
    sum over its tokens of g x^T.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self.matrix = torch.zeros((out_features, in_features), dtype=torch.float64)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add samples: inputs x (samples, tokens, n) and output gradients g (samples, tokens, m).

        Raises ValueError where the two do not belong to the same tokens.
        """
        if x.shape[:-1] != g.shape[:-1]:
            raise ValueError(f"inputs {tuple(x.shape)} and gradients {tuple(g.shape)} differ")
        for one, grad in zip(x.detach(), g.detach(), strict=True):
            rows, columns = grad.reshape(-1, g.shape[-1]), one.reshape(-1, x.shape[-1])
            gradient = rows.float().T @ columns.float()
            self.matrix += gradient.double().square()

    def share(self, ranks: Ranks) -> None:
        """Add up what all processes of a run have, on all of them."""
        ranks.sum(self.matrix)
