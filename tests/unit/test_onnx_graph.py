"""Foreign graphs: whatever operator holds a weight, its shape is told as (outputs, inputs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.onnx_graph import OnnxGraph

MICROSOFT = {"domain": "com.microsoft"}
HALF = np.float16


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One product after another, each the only one of its kind."""
    nodes: list[Any] = []
    weights: dict[str, np.ndarray] = {}
    value = "x"

    def weight(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> str:
        rng = np.random.default_rng(len(weights))
        weights[name] = rng.standard_normal(shape).astype(dtype)
        return name

    def turned(name: str, kind: str = "Transpose", **settings: Any) -> str:
        nodes.append(helper.make_node(kind, [name], [f"{name}.turned"], **settings))
        return f"{name}.turned"

    def product(kind: str, name: str, *inputs: str, **settings: Any) -> None:
        nonlocal value
        # what is not linear stands between, or two products would be a pair
        nodes.append(helper.make_node("Relu", [value], [f"{name}.in"]))
        value = f"{name}.out"
        node = helper.make_node(kind, [f"{name}.in", *inputs], [value], name=f"/layers.0/{name}")
        node.domain = settings.pop("domain", "")
        node.attribute.extend(helper.make_attribute(key, v) for key, v in settings.items())
        nodes.append(node)

    product("Gemm", "gemm", weight("w0", (6, 10)), weight("bias", (10,)))
    product("Gemm", "gemm_b", weight("w1", (7, 10)), transB=1)
    product("MatMul", "turned", turned(weight("w2", (5, 7)), perm=[1, 0]))
    product("FusedMatMul", "fused_b", weight("w3", (9, 5)), transB=1, **MICROSOFT)
    product("FusedMatMul", "fused", weight("w4", (9, 4)), **MICROSOFT)
    again = turned(weight("w5", (4, 3)), perm=[1, 0])
    product("FusedMatMul", "fused_turned_b", again, transB=1, **MICROSOFT)
    product("MatMul", "twice", turned(turned(weight("w6", (3, 8)), perm=[1, 0]), perm=[1, 0]))
    product("MatMul", "half", turned(weight("w7", (8, 2), HALF), "Cast", to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Relu", [value], ["pair.in"]))
    first = helper.make_node(
        "Gemm", ["pair.in", weight("a", (3, 2))], ["low"], name="/layers.0/pair/A", transB=1
    )
    second = helper.make_node(
        "Gemm", ["low", weight("b", (11, 3))], ["y"], name="/layers.0/pair/MatMul", transB=1
    )
    graph = helper.make_graph(
        [*nodes, first, second],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 11])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path: Path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), path)
    return path


def test_the_graph_runs(file: Path) -> None:
    """So its shapes are what they seem: each product's outputs are the next one's inputs."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((5, 6), np.float32)})
    assert y.shape == (5, 11)


def test_shapes_are_outputs_by_inputs(file: Path) -> None:
    found = [(p.weight, p.shape, p.type) for p in OnnxGraph(file).products()]
    assert found == [
        ("w0", (10, 6), "FLOAT"),
        ("w1", (7, 10), "FLOAT"),
        ("w2", (5, 7), "FLOAT"),
        ("w3", (9, 5), "FLOAT"),
        ("w4", (4, 9), "FLOAT"),
        ("w5", (3, 4), "FLOAT"),
        ("w6", (8, 3), "FLOAT"),
        ("w7", (2, 8), "FLOAT16"),
        ("a", (3, 2), "FLOAT"),
        ("b", (11, 3), "FLOAT"),
    ]


def test_inspect_tells_them_so(file: Path) -> None:
    found = inspect(file)
    shapes = {entry["name"]: (entry["form"], entry["shape"]) for entry in found["linears"]}
    assert shapes == {
        "gemm": ("dense", [10, 6]),
        "gemm_b": ("dense", [7, 10]),
        "turned": ("dense", [5, 7]),
        "fused_b": ("dense", [9, 5]),
        "fused": ("dense", [4, 9]),
        "fused_turned_b": ("dense", [3, 4]),
        "twice": ("dense", [8, 3]),
        "half": ("dense", [2, 8]),
        "pair": ("pair", [11, 2]),
    }
    (pair,) = (entry for entry in found["linears"] if entry["form"] == "pair")
    assert pair["rank"] == 3
    assert pair["bytes"] == 4 * 3 * (2 + 11)
    assert found["operators"]["com.microsoft.FusedMatMul"] == 3
    assert found["runtime"] == "onnxruntime"
