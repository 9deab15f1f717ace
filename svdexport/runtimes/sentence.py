"""A sentence encoder in torch: the model, its pooling, and embeddings of length 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from svdexport.errors import InputError
from svdexport.safety.documents import quoted

Pooling = Literal["mean", "cls"]

_POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}

_STAGES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that an embedding here goes through."""


class SentenceEncoder(nn.Module):
    """(input_ids, attention_mask) -> (last_hidden_state, sentence_embedding).

    ``mean`` averages the hidden states of tokens that the mask keeps, ``cls`` takes the first one;
    the embedding is then scaled to length 1. Source: sentence-transformers, Pooling and Normalize.
    """

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1e-9)
        return hidden, nn.functional.normalize(pooled, dim=-1)


def pooling_of(source: Path) -> Pooling:
    """The pooling that a sentence-transformers folder asks for; without one, ``mean``.

    Raises InputError for any other pooling, more than one at once, or a stage of other kind.
    """
    _check_stages(source / "modules.json")
    file = source / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        asked = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a pooling config ({error})") from None
    if len(asked) != 1 or asked[0] not in _POOLING_KEYS:
        raise InputError(
            f"{file}: {', '.join(asked) or 'no pooling'}: only mean or cls is exported"
        )
    return _POOLING_KEYS[asked[0]]


def _check_stages(file: Path) -> None:
    if not file.is_file():
        return
    try:
        types = [str(stage["type"]) for stage in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{file}: not a list of stages ({error!r})") from None
    for stage in (name.rpartition(".")[2] for name in types):
        if stage not in _STAGES:
            raise InputError(
                f"{file}: the stage {quoted(stage)} is not exported: only {', '.join(_STAGES)} are"
            )
