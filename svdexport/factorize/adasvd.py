"""AdaSVD's adaComp: both factors in turn, each the best for the other."""

from __future__ import annotations

import torch

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method
from svdexport.recipe.settings import Adasvd


def factorize(data: GroupData) -> Decomposition:
    """Alternate U <- argmin ||(W - U V) X||_F and V <- U^+ W, from the plain SVD.

    With V = U^+ W the least-squares step gives U' = W H V^T (V H V^T)^-1, whose span is
    (W H W^T) span(U); and V' = U'^+ W makes the product U' V' the projection of W on that span.
    So the alternation is subspace iteration of W H W^T, and with a QR factorisation after each
    step the first k columns are the alternation's result at rank k, for all k at once.
    It ends at SVD-LLM's optimum as the iterations grow.
    """
    assert data.inputs is not None
    assert isinstance(data.settings, Adasvd)
    weight = torch.cat([w.double() for w in data.weights])
    h = data.inputs.double()
    basis = torch.linalg.qr(decompose(data.weights, max_rank=data.max_rank).b.double())[0]
    for _ in range(data.settings.iterations):
        basis = torch.linalg.qr(weight @ (h @ (weight.T @ basis)))[0]
    a = basis.T @ weight
    # what rank k leaves is tr(W H W^T) minus the first k gains, since the basis is orthonormal
    gains = ((a @ h) * a).sum(dim=1)
    total = ((weight @ h) * weight).sum()
    rest = (total - gains.sum()).clamp_min(0.0).reshape(1)
    missing = min(weight.shape) - len(gains)
    energies = torch.cat([gains, rest]) if missing else gains
    return Decomposition(a.float().contiguous(), basis.float().contiguous(), energies, 0.0)


METHOD = Method(
    "adasvd",
    "AdaSVD (adaComp: alternating least squares)",
    "Li et al., 2025, arXiv 2502.01403",
    frozenset({"inputs"}),
    factorize,
)
