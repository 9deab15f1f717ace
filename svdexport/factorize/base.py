"""What a factorisation method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdexport.core.decompose import Decomposition, decompose
from svdexport.core.lowrank import FactorPair
from svdexport.core.moments import Statistic
from svdexport.recipe.settings import NO_SETTINGS, Settings


@dataclass(frozen=True)
class GroupData:
    """One linear, or several that share an input, as a method sees them.

    Attributes:
        weights: W_i (m_i, n).
        inputs: second moment H (n, n) of the shared input, or None.
        gradients: second moments G_i (m_i, m_i) of the output gradients, or None.
        max_rank: largest rank that will be asked for.
        damping: recipe's ``compress.damping``. settings: recipe's ``compress.settings``.
        mean_abs: mean of |x| of the shared input, (n,). fisher: sums over samples of the squared
            gradients of W_i, each (m_i, n). rows: first rows of the shared input, (rows, n). None
            where the method did not ask for them.
    """

    weights: tuple[Tensor, ...]
    inputs: Tensor | None
    gradients: tuple[Tensor, ...] | None
    max_rank: int
    damping: float
    settings: Settings = NO_SETTINGS
    mean_abs: Tensor | None = None
    fisher: tuple[Tensor, ...] | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A method of the family: its name in recipes, where it comes from, what it must be given.

    Attributes:
        needs: statistics of the calibration text.
        factorize: nested factors of one group, for every rank at once.
        only: patterns of the linears that the method is for; empty for all. Such linears never
            share an A.
        embedding: whether the method is for the token embedding, and for nothing else.
        factorize_across: for methods that work on the same group of several adjacent blocks.
        optimal: whether the energies are those of the error on the outputs, ||(W - B A) X||_F^2.
        keep, finish: for methods whose factors are not nested: what to keep of a group, and from
            it and the nested factors cut at the chosen rank, the pair.
    """

    name: str
    title: str
    source: str
    needs: frozenset[Statistic]
    factorize: Callable[[GroupData], Decomposition]
    only: tuple[str, ...] = ()
    embedding: bool = False
    optimal: bool = False
    factorize_across: Callable[[Sequence[GroupData]], list[Decomposition]] | None = None
    keep: Callable[[GroupData], dict[str, Tensor]] | None = None
    finish: Callable[[FactorPair, Mapping[str, Tensor], Settings], FactorPair] | None = None


def completed(
    found: Decomposition, weights: Sequence[Tensor], rank: int, entries: int
) -> Decomposition:
    """At least ``rank`` components and ``entries`` energies, whatever the text determines.

    Components that follow are the plain SVD of W - B A; on the calibration text their energies
    are 0.
    """
    a, b, have = found.a, found.b, found.a.shape[0]
    if have < rank:
        left = torch.cat([w.double() for w in weights]) - b.double() @ a.double()
        rest = decompose([left], max_rank=rank - have)
        a, b = torch.cat([a, rest.a]), torch.cat([b, rest.b], dim=1)
    missing = found.energies.new_zeros(max(0, entries - len(found.energies)))
    return Decomposition(a, b, torch.cat([found.energies, missing]), found.damping)


def split_outputs(stacked: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Rows of a stacked B (sum m_i, k) by member."""
    return tuple(torch.split(stacked, list(sizes)))
