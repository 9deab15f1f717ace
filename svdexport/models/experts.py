"""Experts of a mixture as linears of their own.

transformers keeps all experts of a layer in two stacked parameters, ``gate_up_proj`` (experts,
2 x inner, width) and ``down_proj`` (experts, width, inner). Here every expert becomes a module of
three linears, whose weights are views of the stack: what finds, calibrates and replaces linears
then works on experts too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.ModuleList):
    """A layer's experts, called as transformers' own module is.

    Attributes:
        every: call every expert with all tokens, as where structure is found on shapes alone.
    """

    every = False

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden (tokens, width); experts chosen for each token and their weights (tokens, k)."""
        if self.every or torch.compiler.is_exporting():
            shares = hidden.new_zeros((hidden.shape[0], len(self)))
            shares = shares.scatter(1, index, weights.to(hidden.dtype))
            # each expert has an input of its own, as it has where tokens are chosen
            parts = [
                expert(hidden.view_as(hidden)) * shares[:, number, None]
                for number, expert in enumerate(self)
            ]
            return torch.stack(parts).sum(dim=0)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, slots = torch.where(index == number)
            if len(tokens):
                y = expert(hidden[tokens]) * weights[tokens, slots, None]
                out = out.index_add(0, tokens, y.to(out.dtype))
        return out

    def put(self, name: str, stack: Tensor) -> None:
        """Give all experts the values of ``gate_up_proj`` or ``down_proj``, as dense linears."""
        for expert, values in zip(self, stack, strict=True):
            if name == "down_proj":
                expert.down_proj = _linear(values)
            elif name == "gate_up_proj":
                expert.gate_proj, expert.up_proj = map(_linear, values.chunk(2))
            else:
                raise ValueError(f"experts have no stack {name}")


def separate_experts(model: nn.Module) -> None:
    """Put ``Experts`` in the place of every stack that is gate, up and down without biases.

    Other stacks (with biases, transposed, or with a gate of their own) stay as they are.
    """
    for name, module in list(model.named_modules()):
        if _is_stack(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _separated(module))


def stack_of(model: nn.Module, linear: str) -> str | None:
    """The name that a linear's like in all experts of its layer share; None of any other linear."""
    parts = linear.rsplit(".", 2)
    if len(parts) == 3 and isinstance(model.get_submodule(parts[0]), Experts):
        return f"{parts[0]}.{parts[2]}"
    return None


def _is_stack(module: Any) -> bool:
    try:
        from transformers.integrations.moe import _default_apply_gate
    except ImportError:  # a release of transformers that has none
        return False
    return (
        getattr(module, "_apply_gate", None) is not None
        and type(module)._apply_gate is _default_apply_gate
        and module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed)
        and not getattr(module, "has_post_expert_norm", False)  # older releases know none
        and module.gate_up_proj.shape[1] == 2 * module.down_proj.shape[2]
    )


def _separated(stack: Any) -> Experts:
    gate_up, down = stack.gate_up_proj.detach(), stack.down_proj.detach()
    inner = down.shape[2]
    return Experts(
        Expert(both[:inner], both[inner:], last, stack.act_fn)
        for both, last in zip(gate_up, down, strict=True)
    )


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
