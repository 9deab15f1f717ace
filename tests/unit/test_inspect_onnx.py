from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svdexport.errors import InputError
from svdexport.export.onnx import DATA_FILE
from svdexport.runtimes.inspect_onnx import inspect
from tests.unit.test_export_onnx import SHARED, run_export
from tests.unit.tiny_checkpoints import compress, make_model


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_pairs_ranks_and_bytes_of_our_folder(precision: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    make_model(source, "llama")
    checkpoint = compress(source, tmp_path / "low", SHARED, rank=32)
    run_export(source, checkpoint, out, precision)
    found = inspect(out)
    names = [entry["name"] for entry in found["linears"] if entry["layer"] == 0]
    assert names == [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ]
    forms = {entry["name"]: entry["form"] for entry in found["linears"]}
    assert forms["self_attn.k_proj"] == forms["mlp.up_proj"] == "shared pair"
    assert forms["mlp.down_proj"] == "pair"
    assert {entry["rank"] for entry in found["linears"]} == {32}
    assert [entry["name"] for entry in found["other"]] == ["lm_head"]
    assert found["totals"]["pairs"] == 14
    assert found["totals"]["dense"] == 1
    params = sum(
        int(np.prod(checkpoint.tensor(n).shape)) for n in checkpoint.names() if ".lr_" in n
    )
    head = int(np.prod(checkpoint.tensor("lm_head.weight").shape))
    assert found["totals"]["parameters"] == params + head
    bits = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}[precision]
    in_blocks = sum(entry["bytes"] for entry in found["linears"])
    assert in_blocks == params * bits
    assert in_blocks < (out / DATA_FILE).stat().st_size
    assert found["ir_version"] <= 13
    assert found["opset"]["ai.onnx"] <= 26
    assert found["operators"]["com.microsoft.GroupQueryAttention"] == 2
    assert found["runtime"] == "onnxruntime or onnxruntime-genai"
    assert found["logits"] == "every position"


def test_a_foreign_graph_is_described_by_its_structure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "layers.0.a": rng.standard_normal((16, 4)),
        "layers.0.b": rng.standard_normal((4, 24)),
        "layers.0.dense": rng.standard_normal((24, 8)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.a"], ["u"], name="/layers.0/fc/A"),
        helper.make_node("MatMul", ["u", "layers.0.b"], ["v"], name="/layers.0/fc/MatMul"),
        helper.make_node("Relu", ["v"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "layers.0.dense"], ["y"], name="/layers.0/out/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 8])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "some.onnx")
    found = inspect(tmp_path / "some.onnx")
    assert [(e["name"], e["form"], e["rank"], e["shape"]) for e in found["linears"]] == [
        ("fc", "pair", 4, [24, 16]),
        ("out", "dense", None, [8, 24]),
    ]
    assert found["linears"][0]["bytes"] == 4 * (16 * 4 + 4 * 24)
    assert found["runtime"] == "any ONNX runtime"


def _save(path: Path, nodes: list[Any], *weights: tuple[str, np.ndarray], **metadata: str) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 8])],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    model = helper.make_model(graph, ir_version=10)
    helper.set_model_props(model, {f"svdexport.{key}": text for key, text in metadata.items()})
    onnx.save(model, path)
    return path


def _matmul(*inputs: str) -> Any:
    return helper.make_node("MatMul", ["x", *inputs], ["y"], name="fc")


def test_matmulnbits_without_bits_has_four(tmp_path: Path) -> None:
    settings = {"domain": "com.microsoft", "K": 32, "N": 8, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], name="fc", **settings)
    codes, scales = np.zeros((8, 1, 16), np.uint8), np.ones((8, 1), np.float32)
    found = inspect(_save(tmp_path / "a.onnx", [node], ("codes", codes), ("scales", scales)))
    assert found["other"][0]["types"] == {"weight": "4 bits, blocks of 32"}


def test_what_is_malformed_is_refused_in_one_line(tmp_path: Path) -> None:
    file, weight = tmp_path / "a.onnx", ("w", np.zeros((32, 8), np.float32))
    for rows in ("[1", "[1]", '{"w": 1}', '{"w": [["a", "b"]]}'):
        with pytest.raises(InputError, match=r"a\.onnx: svdexport\.rows"):
            inspect(_save(file, [_matmul("w")], weight, rows=rows))
    with pytest.raises(InputError, match=r"a\.onnx: weight 'w' has no outputs"):
        inspect(_save(file, [_matmul("w")], ("w", np.zeros((32, 0), np.float32))))
    with pytest.raises(InputError, match=r"a\.onnx: node 'fc': a MatMul of one input"):
        inspect(_save(file, [_matmul()], weight))
    circle = [helper.make_node("Cast", [a], [b], to=1) for a, b in ("pq", "qp")]
    with pytest.raises(InputError, match=r"a\.onnx: 'p' is computed from itself"):
        inspect(_save(file, [*circle, _matmul("p")], weight))
    node = helper.make_node("MatMulNBits", ["x", "w"], ["y"], name="fc", domain="com.microsoft")
    with pytest.raises(InputError, match="a MatMulNBits without K, N, block_size"):
        inspect(_save(file, [node], weight))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        inspect(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff\xff\xff")
    with pytest.raises(InputError, match=r"model\.onnx"):
        inspect(tmp_path)
