from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.errors import ArtifactError, InputError
from svdexport.export.base import Exported, ExportRequest
from svdexport.export.onnx import LAST_FILE, MODEL_FILE, check_round_trip, export, read_back
from svdexport.recipe import OnnxExport
from svdexport.runtimes.genai_rt import GenaiRuntime
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.tiny_checkpoints import FAMILIES, VOCAB, compress, load_values, make_model

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj"]
SHARED = [ATTENTION, ["self_attn.o_proj"], MLP, ["mlp.down_proj"]]
APART = [[name] for group in SHARED for name in group]
MIXED = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]

TOKENS = np.random.default_rng(3).integers(3, VOCAB - 1, 40)


def run_export(
    source: Path,
    checkpoint: Checkpoint,
    out: Path,
    precision: str,
    block_size: int = 32,
    **keys: str,
) -> Exported:
    given = {"precision": precision, "block_size": block_size, **keys}
    spec = OnnxExport.model_validate(given)
    return export(ExportRequest(checkpoint, source, None, out, out.parent, spec))


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def relative(found: np.ndarray, meant: np.ndarray) -> float:
    """Largest difference, as a share of the spread (standard deviation) of what is meant."""
    return float(np.abs(found - meant).max() / meant.std())


def dequantised(model: torch.nn.Module, out: Path, checkpoint: Checkpoint, source: Path) -> None:
    values = dict(read_back(out, checkpoint, source, None, out.parent))
    load_values(model, checkpoint, values)


def operators(out: Path) -> list[str]:
    graph = onnx.load(str(out / MODEL_FILE), load_external_data=False).graph
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "groups", [[], SHARED, APART, MIXED], ids=["dense", "shared", "apart", "mixed"]
)
def test_float32_equals_torch(family: str, groups: list[list[str]], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", groups)
    exported = run_export(source, checkpoint, out, "fp32")
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), meant) < 1e-4
    # The same through the cache: a prompt, then single steps.
    runtime._reset(TOKENS.size)  # on the graph of every position, which logits() opened
    steps = [runtime._step(TOKENS[:20])]
    steps += [runtime._step(TOKENS[i : i + 1]) for i in range(20, TOKENS.size)]
    assert relative(np.concatenate(steps), meant) < 1e-4
    runtime.close()


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3"]
)
@pytest.mark.parametrize(("precision", "block_size"), [("int8", 32), ("int4", 32), ("int4", 16)])
def test_quantised_equals_torch_with_the_files_values(
    family: str, precision: str, block_size: int, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, family)
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, precision, block_size)
    assert check_round_trip(out, exported.tensors) == []
    dense = torch_logits(model, TOKENS)
    dequantised(model, out, checkpoint, source)
    meant = torch_logits(model, TOKENS)
    runtime = OrtRuntime(out, threads=1)
    found = runtime.logits(TOKENS)
    runtime.close()
    # Accuracy level 4 rounds activations to int8, worst on random weights; the mean stays small.
    assert np.sqrt(np.mean((found - meant) ** 2)) < 0.1 * meant.std()
    if precision == "int4":
        assert relative(dense, meant) > 2 * relative(found, meant)
    # The same file multiplied in float32: nothing but the values decides.
    set_accuracy_level(out, 0)
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), meant) < 1e-4
    runtime.close()


def set_accuracy_level(out: Path, level: int) -> None:
    model = onnx.load(str(out / MODEL_FILE), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    (out / MODEL_FILE).write_bytes(model.SerializeToString())


def test_shared_factors_cost_the_fewest_operators(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model(source, "llama")
    dense, shared, apart = ([], SHARED, APART)
    counts = {}
    for name, groups in (("dense", dense), ("shared", shared), ("apart", apart)):
        checkpoint = compress(source, tmp_path / f"low-{name}", groups)
        run_export(source, checkpoint, tmp_path / name, "fp32")
        counts[name] = operators(tmp_path / name).count("MatMul")
    # Two layers and the LM head. Dense: qkv, o, gate, up, down. Shared: A and B of qkv (one), o,
    # gate and up (one A), down. Apart: two for each of the seven.
    assert counts["dense"] == 2 * 5 + 1
    assert counts["shared"] in (2 * 9 + 1, 2 * 8 + 1)
    assert counts["apart"] == 2 * 14 + 1


@pytest.mark.parametrize("groups", [[], SHARED], ids=["dense", "shared"])
def test_genai_continues_as_torch_does(groups: list[list[str]], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, "llama")
    checkpoint = compress(source, tmp_path / "low", groups)
    run_export(source, checkpoint, out, "fp32")
    dequantised(model, out, checkpoint, source)
    runtime = GenaiRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), torch_logits(model, TOKENS)) < 1e-4
    prompt = TOKENS[:10].tolist()
    meant = list(prompt)
    for _ in range(64):
        meant.append(int(torch_logits(model, np.array(meant))[-1].argmax()))
        if meant[-1] == 2:
            meant.pop()
            break
    assert runtime.generate(prompt, 64) == meant[10:]
    assert runtime.prefill(TOKENS) > 0
    assert runtime.decode(TOKENS[:8], 4) > 0
    runtime.close()
    plain = OrtRuntime(out, threads=1)
    assert plain.generate(prompt, 64) == meant[10:]
    text = plain.detokenize(plain.tokenize("café ok"))
    assert text == "café ok"
    plain.close()


def test_tied_embedding_is_stored_once_and_quantised_rows_are_looked_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model(source, "llama-tied")
    checkpoint = Checkpoint.open(source)
    sizes = {}
    for precision in ("fp32", "int8"):
        exported = run_export(source, checkpoint, tmp_path / precision, precision)
        assert any("stored once" in note for note in exported.notes)
        sizes[precision] = exported.bytes
    embedding = VOCAB * 64
    assert sizes["fp32"] - sizes["int8"] > embedding * 2
    values = dict(read_back(tmp_path / "int8", checkpoint, source, None, tmp_path))
    assert values["model.embed_tokens.weight"].shape == (VOCAB, 64)
    # A Reshape of the codes would be folded into a second copy as the graph is loaded.
    graph = onnx.load(str(tmp_path / "int8" / MODEL_FILE), load_external_data=False).graph
    codes = next(t.name for t in graph.initializer if list(t.dims) == [VOCAB, 2, 32])
    readers = {node.op_type for node in graph.node if codes in node.input}
    assert readers == {"GatherBlockQuantized", "MatMulNBits"}


def test_a_text_beyond_the_context_is_refused_in_one_line(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    run_export(source, Checkpoint.open(source), out, "fp32")
    runtime = OrtRuntime(out, threads=1)
    with pytest.raises(InputError, match=r"model\.onnx: 200 tokens do not fit .* context of 128"):
        runtime.logits(np.zeros(200, np.int64))
    with pytest.raises(InputError, match=r"model_last\.onnx: 129 tokens do not fit"):
        runtime.generate([5] * 120, 20)
    with pytest.raises(InputError, match=r"onnxruntime cannot run it on 1 tokens \("):
        runtime.logits(np.array([VOCAB]))
    runtime.close()


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = tmp_path / "source", list[str]()
    make_model(source, "llama")
    whole = Checkpoint.tensor

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    run_export(source, Checkpoint.open(source), tmp_path / "onnx", "int8")
    assert sorted(read) == Checkpoint.open(source).names()


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model(source, "llama")
    checkpoint = compress(source, tmp_path / "low", SHARED)
    for name in ("one", "two"):
        run_export(source, checkpoint, tmp_path / name, "int4")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )


def test_a_batch_padded_on_the_right_is_exact(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, "llama")
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, "fp32")
    assert any("on the right" in note for note in exported.notes)
    dequantised(model, out, checkpoint, source)
    runtime = OrtRuntime(out, threads=1)
    lengths = (12, 7, 3, 9)
    feeds = {
        "input_ids": np.stack([np.where(np.arange(12) < n, TOKENS[:12], 2) for n in lengths]),
        "attention_mask": np.stack([np.arange(12) < n for n in lengths]).astype(np.int64),
    }
    feeds |= {name: np.zeros((4, 2, 0, 16), np.float32) for name in runtime._past}
    runtime._open(out / MODEL_FILE)
    every = runtime._session.run(["logits"], feeds)[0]
    runtime._open(out / LAST_FILE)
    last = runtime._session.run(["logits"], feeds)[0]
    runtime.close()
    for row, length in enumerate(lengths):
        meant = torch_logits(model, TOKENS[:length])
        assert relative(every[row, :length], meant) < 1e-4
        assert relative(last[row], meant[-1:]) < 1e-4


def test_a_batch_in_genai_goes_on_as_each_prompt_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    run_export(source, compress(source, tmp_path / "low", SHARED), out, "fp32")
    runtime = GenaiRuntime(out, threads=1)
    settings = json.loads((out / "genai_config.json").read_text())
    pad = settings["model"]["pad_token_id"]
    prompts = [[t for t in TOKENS.tolist() if t != pad][:length] for length in (8, 3)]

    def go_on(rows: list[list[int]]) -> list[list[int]]:
        longest = max(len(row) for row in rows)
        parameters = runtime._genai.GeneratorParams(runtime._model)
        parameters.set_search_options(
            max_length=longest + 6, do_sample=False, batch_size=len(rows), min_length=longest + 6
        )
        generator = runtime._genai.Generator(runtime._model, parameters)
        padded = [row + [pad] * (longest - len(row)) for row in rows]
        generator.append_tokens(np.array(padded, np.int32))
        for _ in range(5):
            generator.generate_next_token()
        return [generator.get_sequence(i)[longest:].tolist() for i in range(len(rows))]

    assert go_on(prompts) == [go_on([prompt])[0] for prompt in prompts]
    runtime.close()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_compressed_lm_head(precision: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, "llama")
    checkpoint = compress(source, tmp_path / "low", [["lm_head"]])
    exported = run_export(source, checkpoint, out, precision)
    assert check_round_trip(out, exported.tensors) == []
    dequantised(model, out, checkpoint, source)
    if precision == "int8":
        set_accuracy_level(out, 0)
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), torch_logits(model, TOKENS)) < 1e-4
    runtime.close()


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    exported = run_export(source, Checkpoint.open(source), out, "int8")
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "model.onnx.data").write_bytes(bytes(data))
    problems = check_round_trip(out, exported.tensors)
    assert len(problems) == 1
    assert "sha256" in problems[0]


def test_the_graph_for_generation_gives_the_last_position_of_the_other(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama-tied")
    checkpoint = compress(source, tmp_path / "low", SHARED)
    exported = run_export(source, checkpoint, out, "int8")
    runtime = OrtRuntime(out, threads=1)
    every = runtime.logits(TOKENS)
    runtime._open(out / LAST_FILE)
    runtime._reset(TOKENS.size)
    last = runtime._step(TOKENS)
    runtime.close()
    assert last.shape == (1, VOCAB)
    assert np.array_equal(last[0], every[-1])
    model = onnx.load(str(out / LAST_FILE), load_external_data=False)
    model.graph.node[5].name += "x"
    (out / LAST_FILE).write_bytes(model.SerializeToString(deterministic=True))
    assert check_round_trip(out, exported.tensors) != []


def test_config_has_both_rope_forms_and_no_quantisation(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    checkpoint = compress(source, tmp_path / "low", SHARED)
    run_export(source, checkpoint, out, "fp32")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5000.0
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert "quantization_config" not in config


def test_llama3_rope_is_exact(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = make_model(source, "llama", rope_parameters=rope)
    run_export(source, Checkpoint.open(source), out, "fp32")
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), torch_logits(model, TOKENS)) < 1e-4
    runtime.close()


def test_a_linear_as_wide_as_the_vocabulary_is_no_lm_head(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_model(source, "llama", intermediate_size=VOCAB)
    run_export(source, Checkpoint.open(source), out, "fp32")
    runtime = OrtRuntime(out, threads=1)
    assert relative(runtime.logits(TOKENS), torch_logits(model, TOKENS)) < 1e-4
    runtime.close()


def test_a_foreign_file_cannot_be_read_back(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    checkpoint = Checkpoint.open(source)
    run_export(source, checkpoint, out, "fp32")
    model = onnx.load(str(out / MODEL_FILE), load_external_data=False)
    del model.metadata_props[:]
    (out / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="not written by svdexport"):
        list(read_back(out, checkpoint, source, None, tmp_path))


def rewritten(out: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Both graphs of a folder, changed alike."""
    for file in (MODEL_FILE, LAST_FILE):
        model = onnx.load(str(out / file), load_external_data=False)
        change(model)
        (out / file).write_bytes(model.SerializeToString(deterministic=True))


def set_ir(model: onnx.ModelProto, version: int) -> None:
    model.ir_version = version


def set_opset(model: onnx.ModelProto, domain: str, version: int) -> None:
    (entry,) = (entry for entry in model.opset_import if entry.domain == domain)
    entry.version = version


def test_whatever_a_folder_holds_otherwise_is_told(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama-bias")
    meant = dict(run_export(source, Checkpoint.open(source), out, "int8").tensors)
    rewritten(out, lambda model: None)
    assert check_round_trip(out, meant) == []
    name = sorted(meant)[len(meant) // 2]
    record = meant[name]
    assert check_round_trip(out, meant | {"more": record}) == ["more: missing"]
    less = {key: value for key, value in meant.items() if key != name}
    assert check_round_trip(out, less) == [f"{name}: not meant"]
    for key, other in {"shape": (1, 2), "type": "BOOL", "nbytes": 3, "sha256": "0" * 64}.items():
        changed = meant | {name: dataclasses.replace(record, **{key: other})}
        expected = f"{name}: {key} is {getattr(record, key)}, meant {other}"
        assert check_round_trip(out, changed) == [expected]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda model: set_ir(model, 14), "IR version 14 is above 13"),
        (lambda model: set_opset(model, "", 27), "opset 27 is above 26"),
        (lambda model: set_opset(model, "com.microsoft", 27), None),
        (lambda model: model.graph.initializer.pop(), "{}: missing"),
        (lambda model: model.graph.initializer.add(name="more", data_type=1), "more: not meant"),
    ],
    ids=["ir", "opset", "domain", "missing", "more"],
)
def test_a_graph_of_another_kind_is_told(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], problem: str | None
) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    meant = run_export(source, Checkpoint.open(source), out, "fp32").tensors
    last = onnx.load(str(out / MODEL_FILE), load_external_data=False).graph.initializer[-1].name
    rewritten(out, change)
    expected = [] if problem is None else [problem.format(last)]
    assert check_round_trip(out, meant) == expected
