"""Dobi-SVD's weight update: W projected on the principal directions of its outputs."""

from __future__ import annotations

import torch

from svdexport.core.decompose import Decomposition
from svdexport.core.pca import IncrementalPca
from svdexport.factorize.base import GroupData, Method, completed
from svdexport.recipe.settings import DobiSvd


def factorize(data: GroupData) -> Decomposition:
    """B = V_k, A = V_k^T W, with V the leading principal directions of the outputs W x.

    They come from an incremental PCA over parts of the calibration rows, which never needs more
    than one part's outputs and ``max_rank`` directions. Parts enter with their singular values,
    so that one V serves every rank; the published code averages the parts' V_i of one given rank,
    which depends on that rank. The truncation positions are the allocation ``dobi_svd``. Beyond
    the directions that the rows span, the plain SVD of what is left of W follows.
    """
    assert data.rows is not None
    assert isinstance(data.settings, DobiSvd)
    weight = torch.cat([w.double() for w in data.weights])
    limit = min(data.max_rank, *weight.shape)
    pca = IncrementalPca(weight.shape[0], limit)
    for part in torch.split(data.rows, data.settings.part):
        pca.add(part.double() @ weight.T)
    directions, energies = pca.directions, pca.energies()
    a = directions.T @ weight
    found = Decomposition(a.float().contiguous(), directions.float().contiguous(), energies, 0.0)
    return completed(found, data.weights, limit, min(weight.shape) + 1)


METHOD = Method(
    "dobi_svd",
    "Dobi-SVD (outputs' principal directions; with allocate: dobi_svd, learned positions)",
    "Wang et al., ICLR 2025, arXiv 2502.02723",
    frozenset({"inputs", "rows"}),
    factorize,
)
