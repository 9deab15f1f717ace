"""Plain truncated SVD of the weights: the baseline every other method must beat."""

from __future__ import annotations

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method


def factorize(data: GroupData) -> Decomposition:
    """Minimise ||W - B A||_F."""
    return decompose(data.weights, max_rank=data.max_rank)


METHOD = Method("svd", "truncated SVD", "Eckart and Young, 1936", frozenset(), factorize)
