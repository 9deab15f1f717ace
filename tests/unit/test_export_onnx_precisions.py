"""2 bits, float16, and graphs of ONNX's own operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_onnx import NBitsGrid, dequantize, quantize, signed
from svdexport.errors import InputError
from svdexport.export.onnx import LAST_FILE, MODEL_FILE, check_round_trip
from svdexport.export.onnx_pack import to_half
from svdexport.models.shapes import shapes_of
from svdexport.pipeline.sizes import weight_bytes
from svdexport.recipe import OnnxExport
from svdexport.runtimes.genai_rt import GenaiRuntime
from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.ort_exact import ExactOrtRuntime
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.test_export_onnx import (
    SHARED,
    TOKENS,
    dequantised,
    relative,
    run_export,
    set_accuracy_level,
    torch_logits,
)
from tests.unit.tiny_checkpoints import compress, make_model


def test_two_bits_have_blocks_of_128_unless_told_otherwise() -> None:
    assert OnnxExport.model_validate({"precision": "int2"}).block_size == 128
    assert OnnxExport.model_validate({"precision": "int4"}).block_size == 32
    given = OnnxExport.model_validate({"precision": "int2", "block_size": 32})
    assert (given.block_size, given.label) == (32, "int2-b32")
    assert OnnxExport.model_validate({"precision": "int2"}).label == "int2"
    assert OnnxExport(precision="int8", operators="standard").label == "int8-standard"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_two_bits_equal_torch_with_the_files_values(family: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family, intermediate_size=256)
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, "int2", 128)
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    runtime = OrtRuntime(out, threads=1)
    found = runtime.logits(TOKENS)
    runtime.close()
    assert np.sqrt(np.mean((found - meant) ** 2)) < 0.15 * meant.std()
    types = {entry["types"]["b"] for entry in inspect(out)["linears"]}
    assert types == {"2 bits, blocks of 128"}
    runtime = ExactOrtRuntime(out, threads=1)
    exact = runtime.logits(TOKENS)
    runtime.close()
    assert relative(exact, meant) < 1e-4
    set_accuracy_level(out, 0)  # in the file, not in memory
    runtime = OrtRuntime(out, threads=1)
    assert np.array_equal(runtime.logits(TOKENS), exact)
    runtime.close()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_float16_by_the_builder_equals_torch(family: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, "fp16")
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    graph = onnx.load(str(out / MODEL_FILE), load_external_data=False).graph
    floats = {tensor.data_type for tensor in graph.initializer} & {1, 10}
    assert floats == {10}  # not one in float32
    if family == "llama-tied":
        assert "FusedMatMul" not in {node.op_type for node in graph.node}
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), meant) < 0.05
    runtime.close()


def test_a_value_too_large_for_float16_is_refused() -> None:
    assert to_half(np.array([65504.0, -1.0]), "w").dtype == np.float16
    with pytest.raises(InputError, match="w: a value beyond float16"):
        to_half(np.array([1.0, -7e4]), "w")


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_signed_codes_are_the_same_numbers(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    quantized = quantize(weight, NBitsGrid(bits, 16))
    codes, scales = signed(quantized)
    assert codes.shape == (40, 6)
    assert scales.shape == (3, 6)
    assert codes.min() >= -(1 << (bits - 1))
    assert codes.max() < 1 << (bits - 1)
    values = codes * np.repeat(scales, 16, axis=0)[:40]
    assert np.array_equal(values.T.astype(np.float32), dequantize(quantized))
    with pytest.raises(ValueError, match="symmetric"):
        signed(quantize(weight, NBitsGrid(bits, 16, symmetric=False)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "operators"), [("llama-tied", "standard"), ("gemma2", "contrib")]
)
def test_a_tied_embedding_narrower_than_a_block_takes_smaller_ones(
    family: str, operators: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    whole = Checkpoint.open(source)
    exported = run_export(source, whole, out, "int2", block_size=128, operators=operators)
    assert "embedding: blocks of 64, which its rows fill" in exported.notes
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, whole, source)
    if operators == "contrib":
        set_accuracy_level(out, 0)
    assert relative(_exact_logits(out, TOKENS), torch_logits(model, TOKENS)) < 1e-4
    spec = OnnxExport.model_validate(
        {"precision": "int2", "block_size": 128, "operators": operators}
    )
    planned = weight_bytes(spec, shapes_of(source), [], {}, "float32")
    written = sum(tensor.nbytes for tensor in exported.tensors.values())
    assert planned <= written < planned + 1000  # the sizes and tables of the graph itself


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("llama", "fp32"),
        ("llama-tied", "fp32"),
        ("llama", "int8"),
        ("llama-tied", "int4"),
        ("llama-tied", "int2"),
        ("gemma2", "fp16"),
    ],
)
def test_standard_operators_alone_equal_torch(family: str, precision: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, precision, operators="standard")
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    found = inspect(out)
    assert not [name for name in found["operators"] if "." in name]
    assert found["runtime"].startswith("any ONNX runtime")
    assert found["opset"] == {"ai.onnx": {"int8": 21, "int4": 21, "int2": 25}.get(precision, 20)}
    assert found["totals"]["pairs"] == len(checkpoint.low_rank)
    for name in (MODEL_FILE, LAST_FILE):
        onnx.checker.check_model(str(out / name))
    limit = 0.05 if precision == "fp16" else 1e-4
    assert relative(_exact_logits(out, TOKENS), meant) < limit
    if precision != "fp16":
        genai, plain = GenaiRuntime(out, threads=1), OrtRuntime(out, threads=1)
        prompt = TOKENS[:16].tolist()
        assert genai.generate(prompt, 8) == plain.generate(prompt, 8)
        genai.close()
        plain.close()


def _exact_logits(out: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits with activations left in float32: a prompt, then single steps with the cache."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(out / MODEL_FILE), options)
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    half = past[0].type == "tensor(float16)"
    kind = np.float16 if half else np.float32
    cache = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), kind) for v in past}
    parts, done = [], 0
    for count in (20, *[1] * (tokens.size - 20)):
        feeds = {
            "input_ids": tokens[None, done : done + count].astype(np.int64),
            "attention_mask": np.ones((1, done + count), np.int64),
            "position_ids": np.arange(done, done + count, dtype=np.int64)[None],
        }
        found = session.run(None, feeds | cache)
        parts.append(found[0][0].astype(np.float32))
        cache = dict(zip(cache, found[1:], strict=True))
        done += count
    return np.concatenate(parts)
