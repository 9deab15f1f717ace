"""What an allocation strategy takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdexport.core.lowrank import break_even_rank, pair_params


@dataclass(frozen=True)
class Candidate:
    """A group of linears that may become a pair with one shared A.

    Attributes:
        name: the leader's name.
        out_features: outputs of all members together. in_features: of their input.
        energies: squared singular values in the method's metric, descending (for ``greedy``:
            in units comparable across groups), or None where they were not computed.
    """

    name: str
    out_features: int
    in_features: int
    energies: np.ndarray | None = None

    @property
    def dense_params(self) -> int:
        return self.out_features * self.in_features

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank; None is dense."""
        if rank is None:
            return self.dense_params
        return pair_params(rank, self.out_features, self.in_features)

    def ranks(self, multiple: int) -> list[int]:
        """The ranks a runtime takes that still save parameters, ascending; may be empty."""
        limit = break_even_rank(self.out_features, self.in_features)
        return list(range(multiple, limit + 1, multiple))


@dataclass(frozen=True)
class Allocation:
    """Rank of a group; None is dense and then ``reason`` says why."""

    rank: int | None
    reason: str = ""


BREAK_EVEN = "no rank that the runtime takes is below break-even"
TOO_LITTLE_TO_SAVE = "the rank for this budget is past break-even"
DENSE_PAYS = "dense pays: the predicted loss per parameter is best spent here"
