"""Encoders (BERT and its kin): a traced graph that also gives the pooled sentence embedding."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from svdexport.errors import InputError
from svdexport.export.onnx_general import prepared
from svdexport.export.onnx_pack import DataWriter
from svdexport.export.onnx_plan import BuildPlan, Emission
from svdexport.export.onnx_trace import exported, traced_model
from svdexport.runtimes.sentence import SentenceEncoder, pooling_of

_BATCH, _TOKENS = 2, 5


def build_encoder(plan: BuildPlan, data: DataWriter, config: Any) -> tuple[ir.Model, Emission]:
    """Trace the encoder and write its weights. Raises InputError where that cannot be done."""
    if plan.half:
        raise InputError(f"{plan.source}: fp16 is not exported for encoders; use int8 or fp32")
    model: Any = traced_model(config, plan.checkpoint, trust_remote_code=plan.trusted)
    wrapped = SentenceEncoder(model, pooling_of(plan.source))
    free = {0: "batch_size", 1: "sequence_length"}
    inputs = {
        "input_ids": torch.ones(_BATCH, _TOKENS, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _TOKENS, dtype=torch.long),
    }
    traced = exported(
        wrapped,
        inputs,
        dict.fromkeys(inputs, free),
        list(inputs),
        ["last_hidden_state", "sentence_embedding"],
    )
    return prepared(traced, plan, data, model)
