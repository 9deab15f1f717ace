"""ONNX folder for onnxruntime-genai and plain onnxruntime: export, and reading back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.checkpoint import Checkpoint, experts_apart, is_encoder
from svdexport.core.grids_onnx import NBitsGrid
from svdexport.errors import ArtifactError, MissingExtraError
from svdexport.export.base import Exported, ExportRequest, TensorRecord
from svdexport.export.onnx_last import differences, last_position_graph
from svdexport.export.onnx_plan import BuildPlan, why_not
from svdexport.packed import PackedFolder
from svdexport.recipe import OnnxExport
from svdexport.runtimes.onnx_graph import ROWS_KEY

MODEL_FILE = "model.onnx"
"""Logits of every position: evaluation, and clients that expect transformers' layout."""

LAST_FILE = "model_last.onnx"
"""Logits of the last position, over the same data: generation."""

DATA_FILE = "model.onnx.data"

TRANSPOSED_KEY = "svdexport.transposed"
"""Model metadata: dense tensors that the checkpoint stores as (inputs, outputs), as GPT-2 does."""

_READERS = (
    *("MatMul", "MatMulNBits", "FusedMatMul", "DequantizeLinear"),
    *("Gather", "GatherBlockQuantized"),
)
"""Operators that read a weight."""

_CODES = (2, 3, 22, 26)
"""TensorProto's UINT8, INT8, INT4 and INT2."""

MAX_IR_VERSION = 13
MAX_OPSET = 26
"""What onnxruntime 1.31 loads."""

_BITS = {"fp32": None, "fp16": None, "int8": 8, "int4": 4, "int2": 2}
_HEAD_BITS = {"fp32": None, "fp16": None, "int8": 8, "int4": 8, "int2": 8}
"""Of fewer bits the LM head, the most sensitive, keeps 8; llama.cpp keeps it at 6."""


def export(request: ExportRequest) -> Exported:
    """Write the folder ``request.out``.

    The graph is the onnxruntime-genai builder's where that is exact, else torch.onnx's. Raises
    InputError where neither can.
    """
    try:
        import onnx_ir  # noqa: F401 (with it the others are there)

        from svdexport.export.onnx_files import write_side_files
        from svdexport.export.onnx_mobile import write_mobile
    except ImportError as error:
        raise MissingExtraError("onnx", f"ONNX export ({error.name} is missing)") from None
    spec = request.spec
    if not isinstance(spec, OnnxExport):
        raise TypeError(f"an ONNX export needs an OnnxExport, not {type(spec).__name__}")
    request.out.mkdir(parents=True, exist_ok=True)
    plan = build_plan(
        spec,
        without_expert_pairs(request.checkpoint),
        request.source,
        PackedFolder.open(request.packed),
    )
    plan = dataclasses.replace(plan, trusted=request.trust_remote_code)
    every, genai, emission, records, reason = _build(plan, request.out)
    files = {MODEL_FILE: every}
    decoder = any(output.name == "logits" for output in every.graph.output)
    if decoder:
        files[LAST_FILE] = last_position_graph(every)
    for name, proto in files.items():
        (request.out / name).write_bytes(proto.SerializeToString(deterministic=True))
    write_side_files(request.source, request.out, genai, LAST_FILE)
    if spec.mobile:
        write_mobile(request.out, LAST_FILE if decoder else MODEL_FILE, DATA_FILE)
    size = sum((request.out / name).stat().st_size for name in (*files, DATA_FILE))
    notes = tuple(_notes(emission, plan, reason))
    if decoder and genai is None and not emission.latent_layers:
        notes += ("no genai_config.json: neither the model nor its tokenizer names an end token",)
    multiplied = len(request.checkpoint.low_rank) - len(plan.checkpoint.low_rank)
    if multiplied:
        notes += (f"{multiplied} pairs of experts are multiplied back: they stand stacked here",)
    return Exported(request.out, "onnx", spec.precision, size, records, notes)


def build_plan(
    spec: OnnxExport, checkpoint: Checkpoint, source: Path, packed: PackedFolder | None = None
) -> BuildPlan:
    """What an export asks of the emitter."""
    return BuildPlan(
        checkpoint,
        source,
        linear_grid(spec),
        _grid(_HEAD_BITS[spec.precision], spec.block_size),
        half=spec.precision == "fp16",
        standard=spec.operators == "standard",
        packed=packed,
        latent=spec.kv_cache == "latent",
    )


def without_expert_pairs(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as the graph sees it: experts are one stack of dense matrices."""
    pairs = {name: p for name, p in checkpoint.low_rank.items() if not experts_apart([name])}
    return dataclasses.replace(checkpoint, low_rank=pairs)


def _build(
    plan: Any, out: Path
) -> tuple[Any, dict[str, Any] | None, Any, dict[str, TensorRecord], str | None]:
    """(graph, genai_config.json, what was emitted, records, why not by the builder).

    Encoders have no genai_config.json.
    """
    from svdexport.export.onnx_builder import build, load_config
    from svdexport.export.onnx_encoder import build_encoder
    from svdexport.export.onnx_general import build_general, genai_settings
    from svdexport.export.onnx_pack import DataWriter

    config = load_config(plan.source, plan.trusted)
    reason = why_not(config, latent=plan.latent, standard=plan.standard)
    genai: dict[str, Any] | None = None
    with DataWriter(out, DATA_FILE) as data:
        if is_encoder(plan.checkpoint.config):
            model, emission = build_encoder(plan, data, config)
        elif reason is None:
            model, genai, emission = build(plan, data, config, out)
        else:
            model, emission = build_general(plan, data, config)
            if not emission.latent_layers:  # else keys and values differ in shape
                genai = genai_settings(config, plan.source, LAST_FILE)
    return described(model, emission), genai, emission, data.records, reason


def described(model: Any, emission: Any) -> Any:
    """The ModelProto of a graph, with metadata that say which tensors its initialisers hold."""
    import onnx_ir as ir

    rows = {name: [list(row) for row in rows] for name, rows in sorted(emission.rows.items())}
    model.metadata_props[ROWS_KEY] = json.dumps(rows, separators=(",", ":"))
    model.metadata_props[TRANSPOSED_KEY] = json.dumps(sorted(emission.transposed))
    return ir.to_proto(model)


def linear_grid(spec: OnnxExport) -> NBitsGrid | None:
    """Grid of the linears of an export; None for float32."""
    return _grid(_BITS[spec.precision], spec.block_size)


def _grid(bits: int | None, block_size: int) -> NBitsGrid | None:
    return None if bits is None else NBitsGrid(bits, block_size)


def _notes(emission: Any, plan: Any, reason: str | None) -> Iterator[str]:
    if reason is not None:
        yield f"graph by torch.onnx, with standard attention operators: {reason}"
    else:
        yield "attention is GroupQueryAttention: pad the prompts of a batch on the right"
    if plan.half:
        yield "weights, activations and logits are float16, for WebGPU; a CPU gains no speed"
    if plan.grid is not None:
        how = "DequantizeLinear and MatMul" if plan.standard else "MatMulNBits, accuracy level 4"
        chosen = plan.packed is not None and plan.packed.kinds
        values = "as the recipe's quantize chose them" if chosen else "rounded to nearest"
        yield (
            f"linears: {plan.grid.bits} bits, blocks of {plan.grid.block_size}, symmetric, "
            f"{values} ({how}; onnxruntime then rounds activations to int8)"
        )
        tables = [name for name in emission.grids if name.startswith("lm_head.MatMul")]
        if emission.shared_embedding and not tables:
            yield "embedding and LM head: float32, as no block divides their width"
        else:
            yield f"LM head or embedding without one: {plan.head_grid.bits} bits"
        narrow = {g.block_size for g in emission.grids.values()} - {plan.grid.block_size}
        yield from (f"embedding: blocks of {size}, which its rows fill" for size in narrow)
    if emission.latent_layers:
        before, after = emission.cache_bytes
        yield (
            f"the cache of values holds A x in {len(emission.latent_layers)} layers: {before:,} "
            f"-> {after:,} bytes a token"
        )
    if emission.shared_embedding:
        yield "embedding and LM head are tied and stored once"
    elif not any("embedding" in name for name in emission.grids):
        yield "embedding: not quantised"
    padded = sorted(
        name for name, grid in emission.grids.items() if emission.columns[name] % grid.block_size
    )
    if padded:
        yield f"{len(padded)} weights have rows that do not fill their last block and are padded"


def read_back(
    path: Path, checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (checkpoint tensor, float32 values) as the written graph holds them.

    Reads the file with onnx and NumPy alone; weights are dequantised from the nodes' attributes.
    Raises ArtifactError where the file does not say which tensors its initialisers hold.
    """
    import onnx

    model = onnx.load(str(path / MODEL_FILE), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if ROWS_KEY not in metadata:
        raise ArtifactError(
            f"{path / MODEL_FILE}: no {ROWS_KEY} metadata: not written by svdexport"
        )
    rows: dict[str, list[tuple[str, int]]] = json.loads(metadata[ROWS_KEY])
    transposed = set(json.loads(metadata.get(TRANSPOSED_KEY, "[]")))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[str] = set()
    halves: dict[str, list[np.ndarray]] = {}  # of tensors that several initialisers hold
    spread = Counter(part[0] for parts in rows.values() for part in parts)
    for node in model.graph.node:
        for name in node.input:
            if name not in rows or name in seen or node.op_type not in _READERS:
                continue
            if node.op_type == "Gather" and tensors[name].data_type in _CODES:
                continue  # codes that are also the LM head's, whose node knows their scales
            if node.op_type == "GatherBlockQuantized" and len(tensors[name].dims) == 3:
                continue  # the same
            seen.add(name)
            values = _node_weight(node, tensors, path)
            start = 0
            for tensor_name, count in rows[name]:
                part = values[start : start + count]
                start += count
                if spread[tensor_name] > 1:
                    halves.setdefault(tensor_name, []).append(part)
                    if len(halves[tensor_name]) < spread[tensor_name]:
                        continue
                    part = np.concatenate(halves.pop(tensor_name))
                yield tensor_name, part.T if tensor_name in transposed else part
            if start != values.shape[0]:
                raise ArtifactError(
                    f"{path / MODEL_FILE}: {name} has {values.shape[0]} rows, "
                    f"its metadata says {start}"
                )
    if seen != set(rows):
        missing = ", ".join(sorted(set(rows) - seen))
        raise ArtifactError(f"{path / MODEL_FILE}: no node reads {missing}")


def _node_weight(node: Any, tensors: Mapping[str, Any], folder: Path) -> np.ndarray:
    """Weight of a linear or embedding node, rows = outputs (or tokens)."""
    from onnx import numpy_helper

    def array(name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(tensors[name], base_dir=str(folder)))

    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Gather":
        values = array(node.input[0]).astype(np.float32)
        return values.T if attributes.get("axis") else values
    if node.op_type == "FusedMatMul":
        return array(node.input[1])
    if node.op_type == "MatMul":
        return array(node.input[1]).T.astype(np.float32)
    if node.op_type == "GatherBlockQuantized":
        codes = array(node.input[0]).astype(np.float32) - (1 << (attributes["bits"] - 1))
        scales = np.repeat(array(node.input[2]), attributes["block_size"], axis=1)
        return np.ascontiguousarray(codes * scales[:, : codes.shape[1]])
    if node.op_type == "DequantizeLinear":  # axis 0 of (inputs, outputs), no zero points
        codes = array(node.input[0]).astype(np.float32)
        scales = np.repeat(array(node.input[1]), attributes["block_size"], axis=0)
        return np.ascontiguousarray((codes * scales[: codes.shape[0]]).T)
    bits, columns = attributes["bits"], attributes["K"]
    packed, scales = array(node.input[1]), array(node.input[2])
    expanded = np.unpackbits(packed, axis=-1, bitorder="little")
    codes = np.packbits(expanded.reshape(*packed.shape[:2], -1, bits), axis=-1, bitorder="little")[
        ..., 0
    ].astype(np.int16)
    zeros: np.ndarray | int = 1 << (bits - 1)
    if len(node.input) > 3 and node.input[3]:
        flat = np.unpackbits(array(node.input[3]), axis=-1, bitorder="little")
        grouped = flat.reshape(packed.shape[0], -1, bits)
        zeros = np.packbits(grouped, axis=-1, bitorder="little")[:, : packed.shape[1]]
        zeros = zeros.astype(np.int16)
    values = (codes - zeros).astype(np.float32) * scales[..., None]
    return np.ascontiguousarray(values.reshape(packed.shape[0], -1)[:, :columns])


def check_round_trip(path: Path, tensors: Mapping[str, TensorRecord]) -> list[str]:
    """Compare the folder's initialisers with what was meant; returns the differences."""
    import onnx

    model = onnx.load(str(path / MODEL_FILE), load_external_data=False)
    problems: list[str] = []
    if any(output.name == "logits" for output in model.graph.output):
        last = onnx.load(str(path / LAST_FILE), load_external_data=False)
        problems += differences(model, last)
    if model.ir_version > MAX_IR_VERSION:
        problems.append(f"IR version {model.ir_version} is above {MAX_IR_VERSION}")
    for opset in model.opset_import:
        if opset.domain == "" and opset.version > MAX_OPSET:
            problems.append(f"opset {opset.version} is above {MAX_OPSET}")
    written = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in sorted(set(written) ^ set(tensors)):
        problems.append(f"{name}: {'not meant' if name in written else 'missing'}")
    for name in sorted(set(written) & set(tensors)):
        found, meant = _record(written[name], path), tensors[name]
        for key in ("shape", "type", "nbytes", "sha256"):
            if getattr(found, key) != getattr(meant, key):
                problems.append(
                    f"{name}: {key} is {getattr(found, key)}, meant {getattr(meant, key)}"
                )
    return problems


def _record(tensor: Any, folder: Path) -> TensorRecord:
    import onnx

    shape = tuple(tensor.dims)
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        data = onnx.numpy_helper.to_array(tensor).tobytes()
        return TensorRecord.of(shape, kind, data)
    place = {entry.key: entry.value for entry in tensor.external_data}
    digest = hashlib.sha256()
    left = int(place["length"])
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        while left > 0 and (chunk := file.read(min(left, 1 << 24))):
            digest.update(chunk)
            left -= len(chunk)
    return TensorRecord(shape, kind, int(place["length"]) - left, digest.hexdigest())
