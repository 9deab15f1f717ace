from __future__ import annotations

from pathlib import Path

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


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        inspect(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff\xff\xff")
    with pytest.raises(InputError, match=r"model\.onnx"):
        inspect(tmp_path)
