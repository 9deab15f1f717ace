"""The torch.onnx path: families that the onnxruntime-genai builder does not do exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError
from svdexport.export.onnx import LAST_FILE, MODEL_FILE, check_round_trip, read_back
from svdexport.export.onnx_builder import load_config
from svdexport.export.onnx_general import genai_settings
from svdexport.export.onnx_plan import why_not
from svdexport.models.loader import load_model
from svdexport.pipeline.artifacts import load_values as load_read_back
from svdexport.runtimes.genai_rt import GenaiRuntime
from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.test_export_onnx import (
    ATTENTION,
    TOKENS,
    dequantised,
    relative,
    run_export,
    set_accuracy_level,
    torch_logits,
)
from tests.unit.tiny_checkpoints import compress, make_model

GROUPS: dict[str, list[list[str]]] = {
    "gemma2": [ATTENTION, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "phi3": [["self_attn.qkv_proj"], ["mlp.gate_up_proj"]],
    "opt": [ATTENTION, ["fc1"]],
    "opt-projected": [["fc1"], ["fc2"]],
    "gpt2": [["attn.c_attn"], ["mlp.c_fc"]],
    "falcon": [["self_attention.query_key_value"], ["mlp.dense_4h_to_h"]],
    "falcon, one key": [["self_attention.query_key_value"], ["self_attention.dense"]],
    "gemma3": [ATTENTION, ["mlp.down_proj"]],
    "mixtral": [ATTENTION, ["self_attn.o_proj"]],
    "qwen2-moe": [ATTENTION, ["mlp.shared_expert.down_proj"]],
}
LONG = 64


@pytest.mark.slow
@pytest.mark.parametrize("family", list(GROUPS))
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_traced_graphs_equal_torch(family: str, precision: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", GROUPS[family])
    exported = run_export(source, checkpoint, out, precision)
    assert any("torch.onnx" in note for note in exported.notes)
    assert check_round_trip(out, exported.tensors) == []
    if family in (
        "mixtral",
        "qwen2-moe",
    ):  # whose experts have other names in the file than in the model
        model = load_model(checkpoint.path)
        load_read_back(model, read_back(out, checkpoint, source, None, tmp_path))
    else:
        dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    if precision == "fp32":
        _check_greedy(out, model)
        _check_genai(out, meant)
    else:
        runtime = OrtRuntime(out, threads=1)
        gap = runtime.logits(TOKENS) - meant
        assert np.sqrt(np.mean(gap**2)) < 0.15 * meant.std()
        runtime.close()
        set_accuracy_level(out, 0)
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), meant) < 1e-4
    runtime._reset(0)
    steps = [runtime._step(TOKENS[:20])]
    steps += [runtime._step(TOKENS[i : i + 1]) for i in range(20, TOKENS.size)]
    assert relative(np.concatenate(steps), meant) < 1e-4
    _check_left_padding(runtime, model, precision)
    runtime.close()
    found = inspect(out)
    assert found["totals"]["pairs"] == len(checkpoint.low_rank)


def _check_greedy(out: Path, model: torch.nn.Module) -> None:
    """64 tokens, each the likeliest after all before it, by torch without a cache."""
    runtime = OrtRuntime(out, threads=1)
    tokens = TOKENS[:16].tolist()
    made = runtime.generate(tokens, LONG)
    runtime.close()
    whole = np.array(tokens + made)
    meant = torch_logits(model, whole)[15:].argmax(-1)
    assert meant[: len(made)].tolist() == made
    assert len(made) == LONG or meant[len(made)] == 2


def _check_genai(out: Path, meant: np.ndarray) -> None:
    runtime = GenaiRuntime(out, threads=1)
    prompt = TOKENS[:16].tolist()
    plain = OrtRuntime(out, threads=1)
    assert runtime.generate(prompt, 8) == plain.generate(prompt, 8)
    assert relative(runtime.logits(TOKENS), meant) < 1e-4
    with pytest.raises(InputError, match="cannot hold 201 tokens"):
        runtime.prefill(np.zeros(200, np.int64))
    runtime.close()
    plain.close()


def _check_left_padding(runtime: OrtRuntime, model: torch.nn.Module, precision: str) -> None:
    """A batch of four, padded on the left as transformers pads for generation."""
    pads = (0, 4, 1, 7)
    tokens = np.stack([np.concatenate([np.full(pad, 2), TOKENS[: 13 - pad]]) for pad in pads])
    mask = np.stack([np.arange(13) >= pad for pad in pads]).astype(np.int64)
    feeds: dict[str, Any] = {
        "input_ids": tokens.astype(np.int64),
        "attention_mask": mask.astype(np.int64),
        "position_ids": np.clip(np.cumsum(mask, 1) - 1, 0, None).astype(np.int64),
    }
    for name in runtime._past:
        shape = runtime._inputs[name].shape
        feeds[name] = np.zeros((4, shape[1], 0, shape[3]), np.float32)
    used = {name: value for name, value in feeds.items() if name in runtime._inputs}
    found = runtime._session.run(["logits"], used)[0]
    for row, pad in enumerate(pads):
        assert relative(found[row, pad:], torch_logits(model, TOKENS[: 13 - pad])) < 1e-4
    if precision == "fp32":  # the accuracy level is that of the other graph alone
        runtime._open(runtime.path / LAST_FILE)
        assert relative(runtime._session.run(["logits"], used)[0], found[:, -1:]) < 1e-5


def test_genai_ends_where_the_generation_config_says(tmp_path: Path) -> None:
    make_model(tmp_path, "phi3")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": 7}')
    found = genai_settings(load_config(tmp_path), tmp_path, "x.onnx")["model"]
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == ([2, 5], 7, 1)


def test_families_go_where_they_are_exact(tmp_path: Path) -> None:
    reasons = {}
    for family in ("llama", "gemma2"):
        make_model(tmp_path / family, family)
        reasons[family] = why_not(load_config(tmp_path / family))
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    make_model(tmp_path / "yarn", "llama", rope_parameters=rope)
    reasons["yarn"] = why_not(load_config(tmp_path / "yarn"))
    assert reasons["llama"] is None
    assert "Gemma2ForCausalLM" in str(reasons["gemma2"])
    assert "yarn" in str(reasons["yarn"])


def test_a_name_that_is_no_linear_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "opt")
    checkpoint = compress(source, tmp_path / "low", [["fc1"]])
    wrong = {name.replace("fc1", "fc3"): spec for name, spec in checkpoint.low_rank.items()}
    changed = Checkpoint(checkpoint.path, checkpoint.config, wrong, checkpoint.files)
    with pytest.raises(InputError, match="fc3"):
        run_export(source, changed, out, "fp32")
    assert not (out / MODEL_FILE).exists()
