"""Alternating least squares: A, then B, each the exact minimiser with the other held."""

from __future__ import annotations

import torch
from torch import Tensor

from svdexport.core.alternate import alternate
from svdexport.core.decompose import damped, without_signal
from svdexport.recipe.refiners import Als
from svdexport.refine.base import Moments, Refined, RefineData, Refiner
from svdexport.refine.pairs import first, pair_tensors, second, set_pair


def refine(data: RefineData, config: Als) -> Refined:
    """Minimise ||G^1/2 (W - B A) H^1/2||_F of every group with the calibration's moments.

    H is the second moment of the inputs in the dense model, G that of the output gradients where
    the method has used them (the identity elsewhere). Where the factorisation was the optimum of
    this metric already (``svd_llm``, ``kfac_svd``), there is nothing to gain.
    """
    teacher = data.teacher()
    before = after = 0.0
    for moments in data.moments():
        for leader, members in data.groups.items():
            if leader in moments.inputs:
                losses = _refine_group(data, config, teacher.weights(members), leader, moments)
                before, after = before + losses[0], after + losses[-1]
    gain = 1.0 - after / before if before > 0.0 else 0.0
    note = (
        f"als: {config.iterations} iterations lower the sum of the squared errors in the moments' "
        f"metric by {gain:.1%}"
    )
    return Refined(pair_tensors(data.student.module, data.groups), (note,))


def _refine_group(
    data: RefineData, config: Als, weights: list[Tensor], leader: str, moments: Moments
) -> tuple[float, ...]:
    module, members = data.student.module, data.groups[leader]
    inputs = moments.inputs[leader].matrix
    gradients, counts = None, True
    if moments.gradients:
        own = [moments.gradients[name].matrix for name in members]
        counts = not without_signal(own)
        gradients = list(damped(own, config.damping))
    b = torch.cat([second(module, name).detach().cpu().double() for name in members])
    a = first(module, leader).detach().cpu().double()
    weight = torch.cat([w.cpu().double() for w in weights])
    found = alternate(weight, a, b, inputs, gradients, iterations=config.iterations)
    set_pair(module, leader, members, found.a, found.b)
    return found.losses if counts else (0.0,)  # without a signal the metric has no scale


REFINER = Refiner(
    "als",
    "alternating least squares in the moments' metric",
    "adaComp of AdaSVD, Li et al., 2025, arXiv 2502.01403",
    refine,
)
