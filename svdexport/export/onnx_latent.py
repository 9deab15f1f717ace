"""A smaller cache: where v is a pair, A x is cached and B comes after attention.

Attention averages values: sum_s p_s B (A x_s) = B sum_s p_s (A x_s), so that the cache holds k
numbers a token instead of all heads' values (the low-rank KV cache of LoRC, Zhang et al., 2024,
arXiv 2410.03111, with the second factor applied late).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "svdexport_latent"
"""Name of the attention below among transformers' implementations."""


class LatentValue(nn.Module):
    """A v projection that gives A x, (batch, tokens, rank); B is kept by heads, for later.

    Attributes:
        stand_ins: buffer of each key-value head's part of B, (rank, head size), by its order.
    """

    def __init__(self, first: nn.Module, stand_ins: tuple[str, ...], bias: Tensor | None) -> None:
        super().__init__()
        self.first = first
        self.stand_ins = stand_ins
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        latent: Tensor = self.first(x)
        return latent


def latent_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with values that may be latent, in transformers' calling convention.

    Args:
        query: (batch, heads, tokens, width). key: (batch, key-value heads, past + tokens, width).
        value: as key; or, latent, (batch, rank / width, past + tokens, width).
    """
    groups = module.num_key_value_groups
    scores = query @ _repeated(key, groups).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    second = module.v_proj
    if not isinstance(second, LatentValue):
        found = shares @ _repeated(value, groups)
    else:
        batch, parts, tokens, width = value.shape
        latent = value.transpose(1, 2).reshape(batch, 1, tokens, parts * width)
        context = shares @ latent
        heads = torch.split(context, groups, dim=1)
        factors = [second.get_buffer(name) for name in second.stand_ins]
        found = torch.cat([h @ b for h, b in zip(heads, factors, strict=True)], dim=1)
        if second.bias is not None:  # the shares of a token sum to one
            by_head = second.bias.view(len(factors), 1, width).repeat_interleave(groups, dim=0)
            found = found + by_head
    return found.transpose(1, 2).contiguous(), shares


def _repeated(states: Tensor, groups: int) -> Tensor:
    batch, heads, tokens, width = states.shape
    wide = states[:, :, None].expand(batch, heads, groups, tokens, width)
    return wide.reshape(batch, heads * groups, tokens, width)


def register() -> None:
    """Make the attention known to transformers; a second call does nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, latent_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
