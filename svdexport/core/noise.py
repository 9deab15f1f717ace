"""What quantisation costs in loss before it is done: predictions from moments.

To second order a change R of a linear's weight costs tr(G R H R^T) with H the second moment of
its inputs and G that of its output gradients. Rounding to a grid leaves R nearly white, with a
mean square of ``eps^2`` times that of the weight; GPTQ's feedback turns tr(H) into tr(D) of
H = (I + U) D (I + U)^T. So one number for each matrix, times ``eps^2`` of a type, is its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition, damped_cholesky
from svdexport.core.grids_gguf import GRIDS

SAMPLE = 256
SPARED = 0.75  # fits GPTQ's errors of nine kinds of inputs (flat to i^-1.4) to 0.07 and mostly 0.03


@dataclass(frozen=True)
class NoiseModel:
    """Loss of relative noise 1 in a group's matrices.

    Attributes:
        dense: in all dense weights. a, b: (r,), in the factors of the pair of rank k at k - 1.
        left: (min(m, n) + 1,), the share of ``dense`` that the best pair of rank k beside the
            quantised weights leaves.
    """

    dense: float
    a: Tensor
    b: Tensor
    left: Tensor


@cache
def relative_noise(type_name: str) -> float:
    """Mean squared error of a Gaussian weight rounded to a ggml type, relative to its square."""
    grid = GRIDS[type_name]
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    scales = grid.search(weight, torch.ones(2048))
    steps = grid.steps(scales)
    error = steps.values(steps.codes(weight)) - weight
    return float(error.square().mean() / weight.square().mean())


def feedback(moment: Tensor, damping: float) -> Tensor:
    """The diagonal of D (n,), float64: what GPTQ leaves of H's in each column."""
    root, _ = damped_cholesky(moment.double().flip(0, 1), damping)
    return root.diagonal().square().flip(0)


def share_left(columns: Tensor, rows: int) -> Tensor:
    """Share of a noise's energy that its best approximation of rank k leaves, k from 0 to
    min(m, n), float64.

    The noise is an (m, n) matrix of independent entries: GPTQ's error in the metric of the inputs.
    The mean squares of its columns are those of D, ``columns`` (n,), to the power of ``SPARED``,
    since scales are searched so that columns that count much lose less. Its spectrum is that of a
    sample with as many rows a column and at most ``SAMPLE`` columns, spread over their order of
    size.
    """
    size = min(len(columns), SAMPLE)
    places = ((torch.arange(size) + 0.5) * len(columns) / size).long()
    chosen = columns.double().sort(descending=True).values[places]
    chosen = chosen.clamp_min(0.0).pow(SPARED)
    sample = torch.randn(
        max(1, round(rows * size / len(columns))),
        size,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    energies = torch.linalg.svdvals(sample * chosen.sqrt()).square()
    known = torch.cat([torch.zeros(1, dtype=torch.float64), energies.cumsum(0)])
    known /= known[-1].clamp_min(torch.finfo(torch.float64).tiny)
    count = min(rows, len(columns))
    ranks = np.arange(count + 1) * (len(known) - 1) / count
    taken = np.interp(ranks, np.arange(len(known)), known.numpy())
    return 1.0 - torch.from_numpy(taken)


def noise_model(
    weights: Sequence[Tensor],
    found: Decomposition,
    inputs: Tensor,
    gradients: Sequence[Tensor],
    *,
    damping: float,
    output_damping: float,
) -> NoiseModel:
    """The model of a group of linears W_i (m_i, n) with one input and its nested factors.

    The factors are those of :func:`svdexport.core.decompose.decompose`, whose A H A^T is diagonal,
    in the even gauge; the pair is taken as mixed (:mod:`svdexport.core.gauge`): rows of A, columns
    of B and components of A x then are of one size each, the mean of what they were.
    """
    columns = feedback(inputs, damping)
    trace = float(columns.sum())
    added = [output_damping * float(g.diagonal().mean()) for g in gradients]
    traces = [float(g.trace()) + len(g) * add for g, add in zip(gradients, added, strict=True)]
    dense = trace * sum(
        float(w.double().square().mean()) * t for w, t in zip(weights, traces, strict=True)
    )
    a, b = found.a.double(), found.b.double()
    parts = torch.split(b, [len(w) for w in weights])
    felt = torch.zeros(len(a), dtype=torch.float64)
    for g, part, add in zip(gradients, parts, added, strict=True):
        felt += ((g.double() @ part + add * part) * part).sum(dim=0)
    count = torch.arange(1, len(a) + 1, dtype=torch.float64)
    of_a = trace * a.square().mean(dim=1).cumsum(0) * felt.cumsum(0) / count
    ranks = ((a @ inputs.double()) * a).sum(dim=1)
    total = sum(traces) / len(b)
    of_b = total * ranks.cumsum(0) * b.square().sum(dim=0).cumsum(0) / count
    return NoiseModel(dense, of_a, of_b, share_left(columns, len(b)))
