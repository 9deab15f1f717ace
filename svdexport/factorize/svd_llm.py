"""SVD-LLM's truncation-aware whitening in a form that needs no inverse of H on the larger side."""

from __future__ import annotations

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method


def factorize(data: GroupData) -> Decomposition:
    """Minimise ||(W - B A) X||_F, with H = X X^T: the error is the sum of dropped sigma^2."""
    return decompose(data.weights, data.inputs, max_rank=data.max_rank)


METHOD = Method(
    "svd_llm",
    "SVD-LLM (truncation-aware whitening)",
    "Wang et al., ICLR 2025, arXiv 2403.07378",
    frozenset({"inputs"}),
    factorize,
    optimal=True,
)
