"""The residual form of a linear: W is near Q + B A, Q on a coarse grid, B A what Q lost.

Base and pair are found in turn: Q quantises W - B A, then B A is the best pair of W - Q in the
metric of the moments. LoftQ (Li et al., ICLR 2024, arXiv 2310.08659) alternates so in the plain
norm; QERA (Zhang et al., ICLR 2025, arXiv 2410.06040) shows that the pair's best metric is that of
the inputs, for a base that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdexport.core.alternate import pair_loss
from svdexport.core.decompose import damped, decompose
from svdexport.core.lowrank import FactorPair


@dataclass(frozen=True)
class Residual:
    """A base, a pair, and how they were found.

    Attributes:
        base: float32 (m, n), the values that the file's grid holds.
        pair: A (k, n) and B (m, k), float32, as rounded by ``round_pair``.
        losses: tr(G R H R^T) / tr(G W H W^T) of R = W - Q - B A after each round; that of the
            result is the smallest, of round ``best``, counted from 0.
    """

    base: Tensor
    pair: FactorPair
    losses: tuple[float, ...]
    best: int


def fit_residual(
    weight: Tensor,
    inputs: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    *,
    gradients: Sequence[Tensor] | None = None,
    output_damping: float = 0.1,
    start: FactorPair | None = None,
    round_pair: Callable[[FactorPair], FactorPair] | None = None,
    rounds: int = 3,
) -> Residual:
    """Fit Q and the rank-k pair to W (m, n) in turn; of all rounds the one of least loss.

    Args:
        weight: the members of a group stacked along m; they share A.
        inputs: H (n, n). gradients: G_i (m_i, m_i) of the members, or None for the identity; damped
            by ``output_damping`` (:func:`svdexport.core.decompose.damped`).
        rank: k, from 1 to min(m, n).
        quantize: (m, n) -> the values that the grid gives back for it; called once a round.
        start: a pair whose product the first base leaves out (that of W itself takes the large
            components out of the grid's way); without it the first base is that of W.
        round_pair: a pair as the file holds it, where the factors are quantised too.
        rounds: at least 1.

    Raises:
        ValueError: ``rounds`` or ``rank`` is out of range, or a tensor is not finite.
    """
    if rounds < 1 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} and {rounds} rounds for a matrix {tuple(weight.shape)}")
    w, metric = weight.double(), inputs.double()
    outputs = None if gradients is None else list(damped(gradients, output_damping))
    zero = torch.zeros_like(w[:, :1]), torch.zeros_like(w[:1])
    total = pair_loss(w, zero[1], zero[0], metric, outputs)
    pair, kept, losses = start, None, []
    for _ in range(rounds):
        rest = w if pair is None else w - pair.dense().double()
        base = quantize(rest.float()).float()
        error = w - base.double()
        sizes = [len(error)] if gradients is None else [len(g) for g in gradients]
        parts = torch.split(error, sizes)
        found = decompose(
            parts, metric, gradients, max_rank=rank, output_damping=output_damping
        ).pair(rank)
        pair = found if round_pair is None else round_pair(found)
        loss = pair_loss(error, pair.a.double(), pair.b.double(), metric, outputs)
        losses.append(loss / total if total > 0 else 0.0)
        if kept is None or losses[-1] < losses[kept[2]]:
            kept = base, pair, len(losses) - 1
    assert kept is not None
    return Residual(*kept[:2], tuple(losses), kept[2])
