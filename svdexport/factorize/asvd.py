"""ASVD: the plain SVD, with input channels scaled by how large their activations are."""

from __future__ import annotations

import torch

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method
from svdexport.recipe.settings import Asvd


def factorize(data: GroupData) -> Decomposition:
    """Minimise ||(W - B A) S||_F with S = diag(mean |x|)^alpha: the optimum for the moment S^2."""
    assert data.mean_abs is not None
    assert isinstance(data.settings, Asvd)
    scale = data.mean_abs.double() ** data.settings.alpha
    return decompose(data.weights, torch.diag(scale.square()), max_rank=data.max_rank)


METHOD = Method(
    "asvd",
    "activation-aware SVD, a scale per input channel",
    "Yuan et al., 2023, arXiv 2312.05821",
    frozenset({"inputs", "mean_abs"}),
    factorize,
)
