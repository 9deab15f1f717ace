"""Factor pairs y = B (A x) and the ranks at which they pay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FactorPair:
    """The two factors of a linear layer, W (m x n) replaced by B A.

    Attributes:
        a: A, shape (k, n), applied first.
        b: B, shape (m, k), applied second.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"A {tuple(self.a.shape)} and B {tuple(self.b.shape)} do not chain")

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def params(self) -> int:
        return self.a.numel() + self.b.numel()

    def dense(self) -> Tensor:
        """B A, shape (m, n)."""
        return self.b @ self.a


def pair_params(rank: int, out_features: int, in_features: int) -> int:
    """Parameters of a pair of the given rank: k (m + n)."""
    return rank * (out_features + in_features)


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank at which a pair has fewer parameters than the dense matrix (m x n), or 0."""
    return (out_features * in_features - 1) // (out_features + in_features)


def round_rank(rank: float, multiple: int) -> int:
    """The multiple nearest to ``rank``, at least one multiple."""
    return max(multiple, int(rank / multiple + 0.5) * multiple)
