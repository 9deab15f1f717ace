"""GPTQ onto the grids that files hold: rounding with error feedback in the inputs' metric.

Minimises tr((W - Q) H (W - Q)^T), the squared output error over calibration, with every value of Q
a point of the grid as it will be read back. Frantar et al., ICLR 2023, arXiv 2210.17323, in the
form of LDLQ (Chee et al., 2023, arXiv 2307.13304), to which it is equal: with
H = (I + U) D (I + U)^T, U strictly upper triangular, the error is
sum_k D_k ||R_k + sum_{i<k} R_i U_ik||^2 for the columns R_i of W - Q, so column k is rounded to
W_k + sum_{i<k} R_i U_ik. No inverse of H is needed. Coordinate descent then visits the columns
again and can only lower the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdexport.core.decompose import damped_cholesky
from svdexport.core.grids import Grid, Scales, Steps, check_finite, joined, nearest_level
from svdexport.core.lowrank import FactorPair

TILE = 128  # columns between two products with all earlier (or all other) columns

Order = Literal["activation", "natural"]


@dataclass(frozen=True)
class GptqConfig:
    """How to quantise.

    Attributes:
        damping: added to H's diagonal, as a share of its mean; multiplied by ten until H has a
            Cholesky factor.
        order: ``activation`` takes the columns by falling H_kk, with all scales searched
            beforehand (static groups); ``natural`` from left to right, each block's scales
            searched on the values that the feedback has made by then.
        sweeps: rounds of coordinate descent afterwards.
    """

    damping: float = 0.001
    order: Order = "activation"
    sweeps: int = 1


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix.

    Attributes:
        codes: uint8 (m, n). scales: the grid's parameters. values: float32 (m, n), what is read.
        damping: share of H's mean eigenvalue that was needed; more than asked after retries.
        error: tr(R H R^T) / tr(W H W^T) of R = W - values with the undamped H; squared, relative.
    """

    codes: Tensor
    scales: Scales
    values: Tensor
    damping: float
    error: float


def relative_error(weight: Tensor, values: Tensor, moment: Tensor | None) -> float:
    """tr(R H R^T) / tr(W H W^T), R = W - values, in float64; 0 where both are 0. H None: I."""
    w, r = weight.double(), weight.double() - values.double()
    h = None if moment is None else moment.double()
    total = float(((w if h is None else w @ h) * w).sum())
    return float(((r if h is None else r @ h) * r).sum()) / total if total > 0 else 0.0


def round_to_nearest(weight: Tensor, moment: Tensor | None, grid: Grid) -> Quantized:
    """Scales searched with H's diagonal as weights (without H: all alike), then plain rounding."""
    check_finite(weight)
    n = weight.shape[1]
    weights = torch.ones(n) if moment is None else moment.diagonal().float()
    padded, weights = _padded(weight.float(), weights, grid.block)
    scales = grid.search(padded, weights)
    steps = grid.steps(scales)
    codes = steps.codes(padded)
    values = steps.values(codes)[:, :n]
    return Quantized(codes, scales, values, 0.0, relative_error(weight, values, moment))


def gptq(weight: Tensor, moment: Tensor, grid: Grid, config: GptqConfig) -> Quantized:
    """Quantise W (m, n) whose inputs have the second moment H (n, n).

    Computes in W's precision (float32, or float64 for tests). Where n is no whole number of
    blocks, codes and scales cover the padding too, and its codes stand for 0.

    Raises:
        ValueError: W or H is not finite, or a value cannot be held by the grid.
    """
    check_finite(weight)
    metric = _Metric.of(moment, config, weight.dtype)
    work = _Columns(weight, metric, grid, config.order)
    work.feed_back()
    for _ in range(config.sweeps):
        work.descend()
    steps = work.steps
    codes = _with_padding(work.codes, steps)
    values = steps.values(codes)[:, : weight.shape[1]]
    error = relative_error(weight, values, moment)
    return Quantized(codes, work.scales, values, metric.damping, error)


def gptq_pair(
    pair: FactorPair,
    moment: Tensor,
    grid_a: Grid,
    grid_b: Grid,
    config: GptqConfig,
    target: Tensor | None = None,
) -> tuple[Quantized, Quantized]:
    """Quantise A with H, then B with A H A^T of the quantised A.

    Two freedoms of a pair are used. Columns of B are scaled to one norm and rows of A by the
    inverse: blocks of B then mix columns of like size, and A's blocks lie within rows. And once A
    is rounded, B is fitted again in the metric of H before it is rounded itself: to ``target``
    (m, n), or without one to the pair's own product.
    """
    a, b = pair.a.float(), pair.b.float()
    norm = b.norm(dim=0)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    first = gptq(a * norm[:, None], moment, grid_a, config)
    h = moment.double()
    rounded = first.values.double()
    inner = rounded @ h @ rounded.T
    seen = h @ rounded.T
    cross = b.double() @ (a.double() @ seen) if target is None else target.double() @ seen
    root, _ = damped_cholesky(inner, 1e-8)
    refitted = torch.cholesky_solve(cross.T, root).T.float()
    return first, gptq(refitted, inner, grid_b, config)


@dataclass(frozen=True)
class _Metric:
    """Damped H in the order of work, its factor, and the column importance for scale searches.

    Attributes:
        order: column worked on k-th is ``order[k]``.
        h: damped H, permuted. u: U, strictly upper, permuted. importance: D of each column, in the
            weight's own order. damping: what was needed.
    """

    order: Tensor
    h: Tensor
    u: Tensor
    importance: Tensor
    damping: float

    @classmethod
    def of(cls, moment: Tensor, config: GptqConfig, dtype: torch.dtype) -> _Metric:
        n = moment.shape[0]
        order = torch.arange(n)
        if config.order == "activation":
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        h = moment.double()[order][:, order]
        h = (h + h.T) / 2
        # A lower factor of H with both axes reversed is an upper factor of H.
        root, damping = damped_cholesky(h.flip(0, 1), config.damping)
        upper = root.flip(0, 1)
        diagonal = upper.diagonal()
        u = (upper / diagonal).triu(1)
        importance = torch.empty(n, dtype=torch.float64)
        importance[order] = diagonal.square()
        mean = float(h.diagonal().mean())
        h.diagonal().add_(damping * mean if mean > 0 else 1.0)
        return cls(order, h.to(dtype), u.to(dtype), importance.float(), damping)


class _Columns:
    """The state of one matrix: all arrays hold columns as rows, in the order of work."""

    def __init__(self, weight: Tensor, metric: _Metric, grid: Grid, order: Order) -> None:
        self.n, self.m = weight.shape[1], weight.shape[0]
        self.metric, self.grid = metric, grid
        self.w = weight.T[metric.order].contiguous()
        self.r = torch.zeros_like(self.w)
        self.codes = torch.zeros((self.m, self.n), dtype=torch.uint8).T.contiguous()
        self._found: list[Scales] = []
        self.scales: Scales = {}
        if order == "activation":
            padded, weights = _padded(weight.float(), metric.importance, grid.block)
            self._use(grid.search(padded, weights))

    def _use(self, scales: Scales) -> None:
        self.scales, self.steps = scales, self.grid.steps(scales)
        dtype = self.w.dtype
        self._scale = self.steps.scale.T.contiguous().to(dtype)
        self._inverse = self.steps.inverse().T.contiguous().to(dtype)
        self._minimum = self.steps.minimum.T.contiguous().to(dtype)
        self._zero = self.steps.zero.T.contiguous().to(dtype)

    def _search(self, values: Tensor, at: int) -> None:
        """Scales of the block that starts at column ``at``, from its values (columns, m)."""
        importance = self.metric.importance[at : at + values.shape[0]]
        padded, weights = _padded(values.T.float().contiguous(), importance, self.grid.block)
        self._found.append(self.grid.search(padded, weights))
        self._use(joined(self._found))

    def _round(self, k: int, column: int, target: Tensor) -> Tensor:
        """Round one column; its values, exactly as they will be read, in the working precision."""
        group = column // self.steps.size
        if self.steps.levels is not None:
            index = nearest_level(target * self._inverse[group], self.steps.levels)
            self.codes[column] = index.to(torch.uint8)
            read = self.steps.levels[index] * self._scale[group].float()
            return read.to(target.dtype)
        minimum, zero = self._minimum[group], self._zero[group]
        code = ((target + minimum) * self._inverse[group]).round_().add_(zero)
        code.clamp_(self.steps.low, self.steps.high)
        self.codes[column] = code.to(torch.uint8)
        if code.dtype == torch.float32:
            return code.sub_(zero).mul_(self._scale[group]).sub_(minimum)
        exact = (code - zero).float() * self._scale[group].float() - minimum.float()
        return exact.to(code.dtype)

    def feed_back(self) -> None:
        """Column by column, the error of each handed on to those after it."""
        order, u, block = self.metric.order.tolist(), self.metric.u, self.grid.block
        dynamic = not self.scales
        tile = max(TILE, block)
        for start in range(0, self.n, tile):
            stop = min(start + tile, self.n)
            target = self.w[start:stop] + u[:start, start:stop].T @ self.r[:start]
            for k in range(start, stop):
                if dynamic and k % block == 0:
                    end = min(k + block, self.n)
                    made = u[start:k, k:end].T @ self.r[start:k]
                    aims = target[k - start : end - start] + made
                    self._search(self._expected(k, end, aims), k)
                aim = target[k - start] + u[start:k, k] @ self.r[start:k]
                torch.sub(self.w[k], self._round(k, order[k], aim), out=self.r[k])

    def _expected(self, start: int, stop: int, aims: Tensor) -> Tensor:
        """What a block's columns will aim at if none of them is rounded, (columns, m).

        A column that follows its aim exactly still has R = W - aim, of which the next ones are
        told: the block's shifts d solve d_j = b_j - sum_{i<j} d_i U_ij, b those from before it.
        """
        own = self.w[start:stop]
        inner = self.metric.u[start:stop, start:stop].T
        shifts = torch.linalg.solve_triangular(inner, aims - own, upper=False, unitriangular=True)
        found: Tensor = own + shifts
        return found

    def descend(self) -> None:
        """Each column to the nearest grid points of its optimum, all others as they are."""
        order, h = self.metric.order.tolist(), self.metric.h
        for start in range(0, self.n, TILE):
            stop = min(start + TILE, self.n)
            slope = h[start:stop] @ self.r
            moved = torch.zeros_like(slope)
            for k in range(start, stop):
                i = k - start
                gradient = slope[i] + h[k, start:k] @ moved[:i]
                old = self.w[k] - self.r[k]
                new = self._round(k, order[k], old + gradient / h[k, k])
                residual = self.w[k] - new
                torch.sub(residual, self.r[k], out=moved[i])
                self.r[k] = residual


def _padded(values: Tensor, weights: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Zero columns without weight up to a whole number of blocks."""
    short = -values.shape[1] % block
    if not short:
        return values, weights
    pad = torch.nn.functional.pad
    return pad(values, (0, short)), pad(weights, (0, short))


def _with_padding(codes: Tensor, steps: Steps) -> Tensor:
    """(m, n + padding) from columns-first codes; padding gets the codes of 0."""
    columns = codes.T
    short = steps.scale.shape[1] * steps.size - columns.shape[1]
    if not short:
        return columns.contiguous()
    zeros = torch.zeros((columns.shape[0], steps.scale.shape[1] * steps.size))
    whole = steps.codes(zeros)
    whole[:, : columns.shape[1]] = columns
    return whole
