"""TFWSVD: every element of W keeps its own Fisher weight; solved numerically, rank by rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdexport.core.lowrank import FactorPair
from svdexport.core.weighted import weighted_pair
from svdexport.factorize import fwsvd
from svdexport.factorize.base import GroupData, Method
from svdexport.recipe.settings import Settings, Tfwsvd


def keep(data: GroupData) -> dict[str, Tensor]:
    """W and F, which the solution at a rank needs."""
    assert data.fisher is not None
    weight = torch.cat([w.float() for w in data.weights])
    fisher = torch.cat(list(data.fisher))
    scale = fisher.max().clamp_min(1e-300)  # squared gradients may lie below float32's range
    return {"weight": weight, "fisher": (fisher / scale).float()}


def finish(start: FactorPair, kept: Mapping[str, Tensor], settings: Settings) -> FactorPair:
    """Lower sum_ij F_ij (W - B A)_ij^2 from FWSVD's solution of this rank."""
    assert isinstance(settings, Tfwsvd)
    return weighted_pair(kept["weight"], kept["fisher"], start, settings.iterations, settings.steps)


METHOD = Method(
    "tfwsvd",
    "Fisher-weighted SVD, a weight per element",
    "Hua et al., EMNLP 2022, arXiv 2211.09718",
    frozenset({"inputs", "fisher"}),
    fwsvd.factorize,
    keep=keep,
    finish=finish,
)
