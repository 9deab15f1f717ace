"""Which modules of a model are linear layers, and which way their weights lie."""

from __future__ import annotations

from torch import nn

_SAME = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear that compute what it computes. Others may not: each by its name."""


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself, one of the same kind, or GPT-2's Conv1D (with a transposed weight)."""
    return type(module) is nn.Linear or type(module).__name__ in _SAME or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in_features, out_features), as GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D"
