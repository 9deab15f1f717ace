"""Sharing a parameter budget out over groups of linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svdexport.allocate import greedy, uniform
from svdexport.allocate.base import Allocation, Candidate

Strategy = Callable[[Sequence[Candidate], float, int], dict[str, Allocation]]

STRATEGIES: dict[str, Strategy] = {"uniform": uniform.allocate, "greedy": greedy.allocate}

__all__ = ["STRATEGIES", "Allocation", "Candidate", "Strategy"]
