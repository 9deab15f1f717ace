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

import torch
from torch import Tensor

from svdexport.core.decompose import INPUT_DAMPING, Decomposition, damped_cholesky
from svdexport.core.gptq import GptqConfig, gptq
from svdexport.core.grids_gguf import GRIDS

PROBE = "Q5_1"  # of all types the one whose error lies most evenly: a pair takes least of it


@dataclass(frozen=True)
class NoiseModel:
    """Loss of relative noise 1 in a group's matrices.

    Attributes:
        dense: in all dense weights. a, b: (r,), in the factors of the pair of rank k at k - 1.
    """

    dense: float
    a: Tensor
    b: Tensor


@cache
def relative_noise(type_name: str) -> float:
    """Mean squared error of a Gaussian weight rounded to a ggml type, relative to its square."""
    grid = GRIDS[type_name]
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    scales = grid.search(weight, torch.ones(2048))
    steps = grid.steps(scales)
    error = steps.values(steps.codes(weight)) - weight
    return float(error.square().mean() / weight.square().mean())


def feedback_trace(moment: Tensor, damping: float) -> float:
    """tr(D): what is left of tr(H) for GPTQ."""
    root, _ = damped_cholesky(moment.double().flip(0, 1), damping)
    return float(root.diagonal().square().sum())


def share_left(weight: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Share of the loss tr(E H E^T) of GPTQ's error E that the best pair of rank k beside the
    quantised W (m, n) leaves, k from 0 to min(m, n), float64.

    Where the error lies is seen by quantising W once to ``PROBE``. Of other types' errors a pair
    takes as much or more: inputs with a huge channel cost those without a minimum most, there.
    Rows that fill no block of it give (1,): no rank is offered.
    """
    if weight.shape[1] % GRIDS[PROBE].block:
        return torch.ones(1, dtype=torch.float64)
    whole, config = weight.float(), GptqConfig(damping, sweeps=0)
    error = (gptq(whole, moment, GRIDS[PROBE], config).values - whole).double()
    if error.shape[0] <= error.shape[1]:
        gram = error @ moment.double() @ error.T
    else:
        root, _ = damped_cholesky(moment.double(), INPUT_DAMPING)
        seen = error @ root
        gram = seen.T @ seen
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
    taken = torch.cat([torch.zeros(1, dtype=torch.float64), energies.cumsum(0)])
    return 1.0 - taken / taken[-1].clamp_min(torch.finfo(torch.float64).tiny)


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
    trace = feedback_trace(inputs, damping)
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
    return NoiseModel(dense, of_a, of_b)
