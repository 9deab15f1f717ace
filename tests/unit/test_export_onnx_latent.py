"""A cache of A x: what it holds, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svdexport.errors import InputError
from svdexport.export.onnx import check_round_trip
from svdexport.recipe import OnnxExport
from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.test_export_onnx import (
    TOKENS,
    dequantised,
    relative,
    run_export,
    set_accuracy_level,
    torch_logits,
)
from tests.unit.tiny_checkpoints import compress, make_model

V_APART = [["self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("llama-bias", "fp32"), ("gemma2", "int8")])
def test_a_latent_cache_is_smaller_and_changes_nothing(
    family: str, precision: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    heads = 8 if family == "gemma2" else 4  # two query heads to each of the four
    model = make_model(source, family, num_key_value_heads=4, num_attention_heads=heads)
    checkpoint = compress(source, tmp_path / "low", V_APART)
    exported = run_export(source, checkpoint, out, precision, kv_cache="latent")
    assert check_round_trip(out, exported.tensors) == []
    told = f"holds A x in 2 layers: {2 * 4 * (64 + 64):,} -> {2 * 4 * (64 + 32)} bytes a token"
    assert any(told in note for note in exported.notes)
    dequantised(model, out, checkpoint, source)
    if precision == "int8":
        set_accuracy_level(out, 0)
    meant = torch_logits(model, TOKENS)
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), meant) < 1e-4
    runtime._reset(0)
    steps = [runtime._step(TOKENS[:20])]
    steps += [runtime._step(TOKENS[i : i + 1]) for i in range(20, TOKENS.size)]
    assert relative(np.concatenate(steps), meant) < 1e-4
    made = runtime.generate(TOKENS[:12].tolist(), 8)
    assert made == torch_logits(model, np.array([*TOKENS[:12], *made]))[11:-1].argmax(-1).tolist()
    runtime.close()
    # Two layers; four heads of 16 keys each; and 32 instead of 64 numbers for the values.
    assert inspect(out)["totals"]["cache_bytes_per_token"] == 2 * 4 * (64 + 32)
    assert not (out / "genai_config.json").exists()


def test_a_rank_that_saves_nothing_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model(source, "llama")  # two key-value heads of 16: 32 numbers, which rank 32 only equals
    checkpoint = compress(source, tmp_path / "low", V_APART)
    with pytest.raises(InputError, match="kv_cache: latent needs a v projection"):
        run_export(source, checkpoint, tmp_path / "onnx", "fp32", kv_cache="latent")
    assert OnnxExport(precision="int8", kv_cache="latent").label == "int8-latent"
