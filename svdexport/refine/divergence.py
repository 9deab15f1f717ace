"""KL divergence from the dense model's next-token distribution, and its gradient, in pieces.

The head's logits are by far the widest tensors: they are made for ``CHUNK`` positions at a time,
and the gradient goes back to the hidden states at once, so that no more than that is ever held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svdexport.refine.base import Decoder

CHUNK = 512  # positions
CACHED = 32  # positions whose logits (200 kB each at 50,000 tokens) pass through a cache together


class _Divergence(torch.autograd.Function):
    """sum over positions of KL(p_t || p_s), with d/ds = p_s - p_t kept instead of the graph."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        vocabulary = student.shape[-1]
        gradient = torch.empty_like(student)
        loss = torch.zeros((), dtype=torch.float32, device=student.device)
        parts = (
            torch.split(x.reshape(-1, vocabulary), CACHED) for x in (student, teacher, gradient)
        )
        for s, t, out in zip(*parts, strict=True):
            log_s = torch.log_softmax(s, dim=-1, dtype=torch.float32)
            log_t = torch.log_softmax(t, dim=-1, dtype=torch.float32)
            p_t = log_t.exp()
            loss += (log_t.sub_(log_s).mul_(p_t)).sum()
            out.copy_(log_s.exp_().sub_(p_t))
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) summed over all positions, in nats.

    Logits are (..., vocabulary); the gradient goes to ``student`` alone.
    """
    result: Tensor = _Divergence.apply(student, teacher)  # type: ignore[no-untyped-call]
    return result


def divergence_of_hidden(
    decoder: Decoder,
    tokens: Tensor,
    student: Tensor,
    teacher: Tensor,
    gradient: bool,
    dense: Decoder | None = None,
) -> tuple[float, Tensor | None]:
    """The summed divergence of hidden states after the last block, and its gradient.

    Args:
        decoder: whose final norm and head both take, unless the teacher has those of ``dense``.
        tokens: (batch, tokens). student, teacher: (batch, tokens, width).

    Returns: nats, and d nats / d student, or None without ``gradient``.
    """
    total = 0.0
    gradients = torch.zeros_like(student) if gradient else None
    for row in range(student.shape[0]):
        for start in range(0, student.shape[1], CHUNK):
            part = (slice(row, row + 1), slice(start, start + CHUNK))
            with torch.no_grad():
                expected = (dense or decoder).logits(tokens[part], teacher[part])
            leaf = student[part].detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                loss = divergence(decoder.logits(tokens[part], leaf), expected)
            if gradients is not None:
                (gradients[part],) = torch.autograd.grad(loss, leaf)
            total += float(loss.detach())
    return total, gradients
