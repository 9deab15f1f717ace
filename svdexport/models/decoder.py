"""A causal language model run part by part: embedding, blocks one by one, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.models.blocks import Structure, record_inputs, run_block, tail_logits
from svdexport.models.modules import linear_weight


class Decoder:
    """See the methods; hidden states are (batch, tokens, width), on the model's device."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.module, self.structure = model, structure
        self._calls: dict[tuple[int, ...], Any] = {}

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.structure.blocks

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block. No sample is padded, so masks depend on the shape alone."""
        inputs = record_inputs(self.module, self.structure, tokens.to(self.device))
        self._calls.setdefault(tuple(inputs.hidden.shape[:2]), inputs.calls)
        return inputs.hidden

    def block(self, index: int, hidden: Tensor) -> Tensor:
        """Output of one block, for hidden states of a shape that was embedded before."""
        call = self._calls[tuple(hidden.shape[:2])][index]
        return run_block(self.module.get_submodule(self.blocks[index]), hidden, call)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Output of the last block."""
        hidden = self.embed(tokens)
        for index in range(len(self.blocks)):
            hidden = self.block(index, hidden)
        return hidden

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Final norm and head of the last block's output, position by position."""
        return tail_logits(self.module, self.structure, tokens.to(self.device), hidden)

    def weights(self, linears: Sequence[str]) -> list[Tensor]:
        """Weights (m, n) of dense linears."""
        return [linear_weight(self.module.get_submodule(name)) for name in linears]
