"""What an ONNX artifact holds and which runtime it needs, from its graph alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from svdexport.runtimes.artifact import size_bytes
from svdexport.runtimes.onnx_graph import OnnxGraph, Product, layer_of
from svdexport.runtimes.ort_rt import model_file
from svdexport.safety.headers import check_onnx

_DROP = (".weight", ".lr_b", ".lr_a", ".MatMul", "/MatMul", "_MatMul")


def inspect(path: Path) -> dict[str, Any]:
    """Describe an ONNX folder or file, ours or anyone's.

    A pair is a product with a constant weight that multiplies nothing but the result of another
    such product; our own files say which are. Members of a stacked product are told apart where
    the file says how (ours do).

    Returns:
        ``format, path, architecture, runtime, ir_version, logits`` (``every position`` or ``last
        position``); ``opset``: domain -> version; ``operators``: type -> count; ``linears``: per
        linear of a block ``layer, name, form`` (dense, pair, shared pair), ``rank, shape``
        (outputs, inputs), ``types, bytes``, a shared A's bytes counted at its first member;
        ``other``: the same outside the blocks; ``totals``.

    Raises:
        InputError: the file is broken, or no ONNX model is there.
    """
    file = model_file(path)
    check_onnx(file)
    graph = OnnxGraph(file)
    operators = Counter(_qualified(node) for node in graph.nodes)
    entries = _entries(graph)
    linears = [entry for entry in entries if entry["layer"] is not None]
    forms = Counter(entry["form"] for entry in entries)
    found = {
        "format": "onnx",
        "path": str(path),
        "architecture": _architecture(file.parent, path),
        "runtime": _runtime(operators, file.parent),
        "ir_version": int(graph.model.ir_version),
        "logits": _logits(graph),
        "opset": {item.domain or "ai.onnx": int(item.version) for item in graph.model.opset_import},
        "operators": dict(sorted(operators.items())),
        "linears": linears,
        "other": [entry for entry in entries if entry["layer"] is None],
        "totals": {
            "bytes": size_bytes(path),
            "graph_bytes": file.stat().st_size,
            "weight_bytes": sum(graph.nbytes(name) for name in graph.initializers),
            "parameters": sum(math.prod(e["shape"]) for e in entries if e["form"] == "dense")
            + sum(e.pop("_params") for e in entries if e["form"] != "dense"),
            "tensors": len(graph.initializers),
            "cache_bytes_per_token": _cache_bytes(graph),
            "dense": forms["dense"],
            "pairs": sum(forms.values()) - forms["dense"],
        },
    }
    mobile = file.parent / "mobile"
    if (mobile / "model.ort").is_file():
        found["mobile"] = _mobile(mobile)
    return found


def _mobile(folder: Path) -> dict[str, Any]:
    """Size of the ORT-format model, and the operators that a reduced build must hold."""
    operators: dict[str, list[str]] = {}
    for line in (folder / "required_operators.config").read_text(encoding="utf-8").splitlines():
        if not line.startswith(("#", "!")) and line.count(";") >= 2:
            domain, opset, names = line.split(";", 2)
            operators[f"{domain} {opset}"] = _without_types(names).split(",")
    return {"bytes": (folder / "model.ort").stat().st_size, "operators": operators}


def _cache_bytes(graph: OnnxGraph) -> int | None:
    """Bytes of keys and values that a token leaves in the cache; None where a size is open."""
    total = 0
    for value in graph.model.graph.input:
        if value.name.startswith("past_key_values."):
            kind = value.type.tensor_type
            dims = [dim.dim_value for dim in kind.shape.dim]
            if len(dims) != 4 or not dims[1] or not dims[3]:
                return None
            total += dims[1] * dims[3] * (2 if kind.elem_type == 10 else 4)
    return total


def _without_types(text: str) -> str:
    """A line of operators without the JSON after each name, which says what types it needs."""
    kept, depth = [], 0
    for character in text:
        depth += character == "{"
        if not depth:
            kept.append(character)
        depth -= character == "}"
    return "".join(kept)


def _entries(graph: OnnxGraph) -> list[dict[str, Any]]:
    """One entry a linear; the first factors of pairs are told with their second ones."""
    products = graph.products()
    by_output = {product.output: product for product in products}
    readers = Counter(name for node in graph.nodes for name in node.input)
    firsts: dict[str, Product] = {}
    rows = graph.rows()
    for product in products:
        a = by_output.get(product.source)
        if a is None or (rows and not _is_first(rows.get(a.weight, []))):
            continue
        if readers[a.output] == _products_reading(products, a.output):
            firsts[product.node] = a
    inner = {a.node for a in firsts.values()}
    counted, entries = set[str](), []
    for product in products:
        if product.node in inner:
            continue
        members = rows.get(product.weight) or [(product.node, product.shape[0])]
        a = firsts.get(product.node)
        shared = len(members) > 1 or (a is not None and _products_reading(products, a.output) > 1)
        for name, count in members:
            entry = _entry(graph, product, name, count)
            if a is not None:
                _add_first(graph, entry, a, shared, counted)
            entries.append(entry)
    return entries


def _is_first(members: list[tuple[str, int]]) -> bool:
    """Whether an initialiser of ours is an A; OPT's projection before its head is none."""
    return any(name.endswith(".lr_a.weight") for name, _ in members)


def _products_reading(products: list[Product], value: str) -> int:
    return sum(product.source == value for product in products)


def _entry(graph: OnnxGraph, product: Product, name: str, rows: int) -> dict[str, Any]:
    size = sum(graph.nbytes(read) for read in product.initializers)
    layer, short = layer_of(name)
    for ending in _DROP:
        short = short.removesuffix(ending)
    return {
        "layer": layer,
        "name": short.strip("/"),
        "form": "dense",
        "rank": None,
        "shape": [rows, product.shape[1]],
        "types": {"weight": product.type},
        "bytes": size * rows // product.shape[0],
    }


def _add_first(
    graph: OnnxGraph, entry: dict[str, Any], a: Product, shared: bool, counted: set[str]
) -> None:
    rank, inputs = a.shape
    entry["form"] = "shared pair" if shared else "pair"
    entry["rank"] = rank
    entry["_params"] = entry["shape"][0] * rank
    entry["shape"] = [entry["shape"][0], inputs]
    entry["types"] = {"a": a.type, "b": entry["types"]["weight"]}
    if a.node not in counted:
        counted.add(a.node)
        entry["bytes"] += sum(graph.nbytes(read) for read in a.initializers)
        entry["_params"] += rank * inputs


def _qualified(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _logits(graph: OnnxGraph) -> str | None:
    for output in graph.model.graph.output:
        if output.name == "logits":
            dims = output.type.tensor_type.shape.dim
            return (
                "last position" if len(dims) == 3 and dims[1].dim_value == 1 else "every position"
            )
    return None


def _architecture(*folders: Path) -> str | None:
    for folder in folders:
        file = folder / "config.json"
        if file.is_file():
            names = json.loads(file.read_text(encoding="utf-8")).get("architectures")
            return str(names[0]) if names else None
    return None


def _runtime(operators: Counter[str], folder: Path) -> str:
    contrib = any(name.startswith("com.microsoft.") for name in operators)
    need = "onnxruntime" if contrib else "any ONNX runtime"
    return f"{need} or onnxruntime-genai" if (folder / "genai_config.json").exists() else need
