"""The torch.onnx path: families that the onnxruntime-genai builder does not do exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import svdexport
from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError
from svdexport.export.onnx import LAST_FILE, MODEL_FILE, check_round_trip, read_back
from svdexport.export.onnx_builder import load_config
from svdexport.export.onnx_general import genai_settings
from svdexport.export.onnx_plan import why_not
from svdexport.export.onnx_trace import exported, traced_model
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
from tests.unit.tiny_checkpoints import compress, make_model, save_tokenizer

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
HEAD_CODES = "lm_head.MatMul.weight_Q8"


@pytest.mark.slow
@pytest.mark.parametrize("family", list(GROUPS))
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_traced_graphs_equal_torch(family: str, precision: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", GROUPS[family])
    exported = run_export(source, checkpoint, out, precision)
    notes = " ".join(exported.notes)
    assert "torch.onnx" in notes
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
        # A Reshape of the codes would be folded into a second copy as the graph is loaded.
        graph = onnx.load(str(out / MODEL_FILE), load_external_data=False).graph
        codes = next((t.name for t in graph.initializer if t.name == HEAD_CODES), None)
        readers = {node.op_type for node in graph.node if codes in node.input}
        assert readers <= {"GatherBlockQuantized", "MatMulNBits"}
        assert len(readers) == (2 if "embedding and LM head are tied" in notes else bool(codes))
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
    settings = genai_settings(load_config(tmp_path), tmp_path, "x.onnx")
    assert settings is not None
    found = settings["model"]
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == ([2, 5], 7, 1)


def test_genai_knows_a_length_and_an_end_of_every_model(tmp_path: Path) -> None:
    def found(family: str, **changes: Any) -> dict[str, Any] | None:
        config = AutoConfig.for_model(family, vocab_size=320, **changes)
        return genai_settings(config, tmp_path, "x.onnx")

    no_end = {"eos_token_id": None, "bos_token_id": None}
    assert found("bloom", **no_end) is None
    save_tokenizer(tmp_path)
    bloom = found("bloom", **no_end)
    assert bloom is not None
    assert (bloom["model"]["context_length"], bloom["model"]["eos_token_id"]) == (2048, 2)
    codegen = found("codegen", n_positions=128, bos_token_id=1, eos_token_id=5)
    assert codegen is not None
    assert (codegen["search"]["max_length"], codegen["model"]["pad_token_id"]) == (128, 5)


@pytest.mark.slow
def test_a_head_that_is_not_tied_is_its_own(tmp_path: Path) -> None:
    """GPT-NeoX's has another name in the file than in the model."""
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, "gpt-neox")
    checkpoint = Checkpoint.open(source)
    assert checkpoint.stored == {"lm_head.weight": "embed_out.weight"}
    run_export(source, checkpoint, out, "fp32")
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), torch_logits(model, TOKENS)) < 1e-4
    runtime.close()
    # Nothing says where an operator was traced: the file would hold paths of this machine.
    for name in (MODEL_FILE, LAST_FILE):
        graph = onnx.load(str(out / name), load_external_data=False).graph
        values = (*graph.input, *graph.output, *graph.value_info)
        assert not any(one.metadata_props for one in (graph, *graph.node, *values))
        written = (out / name).read_bytes()
        assert str(Path(svdexport.__file__).parent).encode() not in written
        assert b"site-packages" not in written
    headless = {name: file for name, file in checkpoint.files.items() if name != "lm_head.weight"}
    changed = dataclasses.replace(checkpoint, files=headless)
    with pytest.raises(InputError, match=r"tensor lm_head.weight is missing"):
        run_export(source, changed, tmp_path / "headless", "fp32")


def test_buffers_that_a_checkpoint_holds_are_its_own(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "glm4_moe",
        **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    )
    model = AutoModelForCausalLM.from_config(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(torch.arange(4.0))
    model.save_pretrained(tmp_path)
    traced = traced_model(load_config(tmp_path), Checkpoint.open(tmp_path))
    assert traced.get_buffer(name).tolist() == [0, 1, 2, 3]


def test_what_cannot_be_traced_says_why_in_one_line() -> None:
    class Branches(torch.nn.Module):
        model = torch.nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"ReLU: torch.onnx cannot trace it \(Could not") as raised:
        exported(Branches(), {"x": torch.ones(2)}, {"x": None}, ["x"], ["y"])
    assert str(raised.value).isprintable()


def test_families_go_where_they_are_exact(tmp_path: Path) -> None:
    reasons = {}
    for family in ("llama", "gemma2"):
        make_model(tmp_path / family, family)
        reasons[family] = why_not(load_config(tmp_path / family))
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    make_model(tmp_path / "yarn", "llama", rope_parameters=rope)
    reasons["yarn"] = why_not(load_config(tmp_path / "yarn"))
    others: dict[str, dict[str, Any]] = {
        "heads of 24": {"head_dim": 24},
        "activation tanh": {"hidden_act": "tanh"},
        "part of a head": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    }
    for reason, changes in others.items():
        make_model(tmp_path / reason, "llama", **changes)
        assert reason in str(why_not(load_config(tmp_path / reason)))
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
