"""Low-rank token embedding whose rows keep their direction rather than their position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition, decompose, eigen_descending
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

    The cosine of a row e with its image U U^T e is ||U^T e|| / ||e||. Its sum over rows is raised
    by eigenproblems of sum_i w_i u_i u_i^T, u = e / ||e||, with w_i = 1 / ||U^T u_i|| of the step
    before: each step maximises a lower bound that touches the sum where the step began, so the
    sum never falls. The paper trains the same linear autoencoder by gradient descent, with the
    distance as a second term; the norms here are those of the projection.
    """
    assert isinstance(settings, EmbAe)
    weight = kept["weight"].double()
    lengths = weight.norm(dim=0).clamp_min(1e-12)
    directions = weight / lengths
    basis = start.b.double()
    for _ in range(settings.iterations):
        cosines = (basis.T @ directions).norm(dim=0).clamp_min(1e-6)
        basis = eigen_descending((directions / cosines) @ directions.T)[1][:, : start.rank]
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
