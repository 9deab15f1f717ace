"""FWSVD: the plain SVD, with input channels weighted by their Fisher information."""

from __future__ import annotations

import torch

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method


def factorize(data: GroupData) -> Decomposition:
    """Minimise ||(W - B A) diag(I)||_F with I_j = sqrt(sum over outputs i of F_ij).

    F is the sum over calibration samples of the squared gradient of W. The paper's SVD of
    W diag(I), with diag(I) undone, is the optimum for the input moment diag(I^2).
    """
    assert data.fisher is not None
    importance = torch.stack([fisher.sum(dim=0) for fisher in data.fisher]).sum(dim=0)
    return decompose(data.weights, torch.diag(importance), max_rank=data.max_rank)


METHOD = Method(
    "fwsvd",
    "Fisher-weighted SVD, a weight per input channel",
    "Hsu et al., ICLR 2022, arXiv 2207.00112",
    frozenset({"inputs", "fisher"}),
    factorize,
)
