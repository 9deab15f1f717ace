"""What a factorisation method is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition

Needs = Literal["nothing", "inputs", "gradients"]


@dataclass(frozen=True)
class GroupData:
    """One linear, or several that share an input, as a method sees them.

    Attributes:
        weights: W_i (m_i, n).
        inputs: second moment H (n, n) of the shared input, or None.
        gradients: second moments G_i (m_i, m_i) of the output gradients, or None.
        max_rank: largest rank that will be asked for.
        damping: recipe's ``compress.damping``.
    """

    weights: tuple[Tensor, ...]
    inputs: Tensor | None
    gradients: tuple[Tensor, ...] | None
    max_rank: int
    damping: float


@dataclass(frozen=True)
class Method:
    """A method of the family: its name in recipes, where it comes from, what it must be given."""

    name: str
    title: str
    source: str
    needs: Needs
    factorize: Callable[[GroupData], Decomposition]


def split_outputs(stacked: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Rows of a stacked B (sum m_i, k) by member."""
    return tuple(torch.split(stacked, list(sizes)))
