"""SVD-LLM V2: truncation-aware whitening by two SVDs, without a Cholesky factor."""

from __future__ import annotations

import torch

from svdexport.core.decompose import Decomposition, eigen_descending
from svdexport.factorize.base import GroupData, Method, completed

# Directions of H below this share of its largest eigenvalue are rounding: float64 keeps 16 digits
# of the largest one.
_FLOOR = 1e-12


def factorize(data: GroupData) -> Decomposition:
    """With H = U s U^T and W U s^1/2 = P d Q^T: B = P d, A = Q^T s^-1/2 U^T (d may go to A).

    The same optimum as SVD-LLM's, found through the eigenvectors of H, so that a singular H needs
    no damping: beyond its rank, the plain SVD of what is left of W follows. The second SVD is taken
    from the smaller of its two Gram matrices. The ratios inside a type of matrix are the allocation
    strategy of the same name.
    """
    assert data.inputs is not None
    weight = torch.cat([w.double() for w in data.weights])
    values, vectors = eigen_descending(data.inputs.double())
    kept = max(1, int((values > _FLOOR * values[0]).sum()))
    root = values[:kept].sqrt()
    if float(root[0]) == 0.0:  # an input that is always zero: any pair will do
        vectors, root = torch.eye(len(values)).double(), torch.ones(len(values)).double()
    u = vectors[:, : len(root)]
    scaled = (weight @ u) * root
    limit = min(*scaled.shape, data.max_rank)
    if scaled.shape[1] <= scaled.shape[0]:
        energies, q = eigen_descending(scaled.T @ scaled)
        b, right = scaled @ q[:, :limit], q[:, :limit]
    else:
        energies, p = eigen_descending(scaled @ scaled.T)
        b = p[:, :limit]
        right = scaled.T @ b
    a = (u @ (right / root[:, None])).T
    found = Decomposition(a.float().contiguous(), b.float().contiguous(), energies, 0.0)
    most = min(weight.shape)
    return completed(found, data.weights, min(most, data.max_rank), most)


METHOD = Method(
    "svd_llm_v2",
    "SVD-LLM V2 (whitening by two SVDs)",
    "Wang et al., 2025, arXiv 2503.12340",
    frozenset({"inputs"}),
    factorize,
    optimal=True,
)
