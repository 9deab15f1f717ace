"""Basis sharing: one A for the linears of a kind in adjacent blocks, each with its own B."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition, decompose, energies_of, orthonormal_in
from svdexport.factorize.base import GroupData, Method
from svdexport.recipe.settings import BasisSharing


def factorize(data: GroupData) -> Decomposition:
    """A group that shares with no other block: SVD-LLM's whitening."""
    return factorize_across([data])[0]


def factorize_across(blocks: Sequence[GroupData]) -> list[Decomposition]:
    """Stack W_i of the blocks, whiten by H = sum of H_i, and give each block its rows of B.

    In the paper's orientation the blocks' matrices stand side by side and share a basis of the
    input space; that is our A. With ``refit`` each B_i = W_i H_i A^T (A H_i A^T)^-1 is the best
    for the shared A and the block's own inputs; A is first made orthonormal in H_i from its first
    row on, so that this holds for every rank and B_i A spans what it did.
    """
    first = blocks[0]
    assert isinstance(first.settings, BasisSharing)
    moments = [block.inputs for block in blocks if block.inputs is not None]
    stacked = [weight for block in blocks for weight in block.weights]
    total = torch.stack(moments).sum(dim=0)
    joint = decompose(stacked, total, max_rank=first.max_rank)
    sizes = [sum(weight.shape[0] for weight in block.weights) for block in blocks]
    parts = torch.split(joint.b, sizes)
    return [
        _own(block, joint.a, part, first.settings.refit)
        for block, part in zip(blocks, parts, strict=True)
    ]


def _own(block: GroupData, a: Tensor, b: Tensor, refit: bool) -> Decomposition:
    weight = torch.cat([w.double() for w in block.weights])
    assert block.inputs is not None
    if refit:
        basis = orthonormal_in(a.double(), block.inputs.double())
        coefficients = weight @ block.inputs.double() @ basis.T
        a, b = basis.float().contiguous(), coefficients.float()
    energies = energies_of(weight, a, b, block.inputs)
    return Decomposition(a, b.contiguous(), energies, 0.0)


METHOD = Method(
    "basis_sharing",
    "basis sharing across adjacent blocks",
    "Wang et al., 2024, arXiv 2410.03765",
    frozenset({"inputs"}),
    factorize,
    factorize_across=factorize_across,
)
