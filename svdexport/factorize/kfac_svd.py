"""Loss-aware truncation: whitened by the inputs and by the output gradients (two-sided)."""

from __future__ import annotations

from svdexport.core.decompose import Decomposition, decompose
from svdexport.factorize.base import GroupData, Method


def factorize(data: GroupData) -> Decomposition:
    """Minimise ||G^1/2 (W - B A) H^1/2||_F: to second order, what the truncation costs in loss.

    H (x) G is the Kronecker-factored Fisher information of the layer, so the dropped squared
    singular values are comparable across layers and one global allocation can rank them.
    """
    return decompose(
        data.weights,
        data.inputs,
        data.gradients,
        max_rank=data.max_rank,
        output_damping=data.damping,
    )


METHOD = Method(
    "kfac_svd",
    "loss-aware SVD (Kronecker-factored Fisher)",
    "svdexport; Fisher factors after Martens and Grosse, 2015, arXiv 1503.05671",
    frozenset({"inputs", "gradients"}),
    factorize,
)
