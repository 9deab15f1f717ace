"""Low-rank token embedding whose rows keep their direction rather than their position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition, decompose
from svdexport.core.lowrank import FactorPair
from svdexport.factorize.base import GroupData, Method
from svdexport.recipe.settings import EmbAe, Settings


def factorize(data: GroupData) -> Decomposition:
    """The embedding E (tokens, width) as W = E^T: the plain SVD, which keeps positions."""
    return decompose(data.weights, max_rank=data.max_rank)


def keep(data: GroupData) -> dict[str, Tensor]:
    """E^T, whose rows' directions the solution at a rank needs."""
    return {"weight": torch.cat([w.float() for w in data.weights])}


def finish(start: FactorPair, kept: Mapping[str, Tensor], settings: Settings) -> FactorPair:
    """B = U, A = U^T E^T with U the k-dimensional subspace that maximises the summed cosines.

    The cosine of a row e with its image U U^T e is f_e(U) = ||U^T e|| / ||e||, which is convex in
    U. So the sum lies above its linearisation, tr(U^T M U_0) with M = sum_i w_i u_i u_i^T,
    u = e / ||e|| and w_i = 1 / ||U_0^T u_i||, and is equal to it at U_0; the orthonormal U that
    maximises it spans M U_0. Hence no step lowers the sum. (The leading eigenvectors of M, where
    such steps with w held end, may: rows that U_0 leaves out weigh most.) The paper trains the same
    linear autoencoder by gradient descent, with the distance as a second term; the norms here are
    those of the projection.
    """
    assert isinstance(settings, EmbAe)
    weight = kept["weight"].double()
    directions = weight / weight.norm(dim=0).clamp_min(1e-12)
    basis = torch.linalg.qr(start.b.double())[0]  # its columns may have been scaled
    for _ in range(settings.iterations):
        images = basis.T @ directions
        cosines = images.norm(dim=0).clamp_min(1e-6)
        basis = torch.linalg.qr(directions @ (images / cosines).T)[0]
    a = basis.T @ weight
    return FactorPair(a.float().contiguous(), basis.float().contiguous())


METHOD = Method(
    "emb_ae",
    "low-rank token embedding, tied head included, trained for direction",
    "Balazy et al., 2021, arXiv 2106.08181",
    frozenset(),
    factorize,
    embedding=True,
    keep=keep,
    finish=finish,
)
