"""Bytes of the exports of a plan, from names and shapes alone.

A GGUF's are exact to the byte, metadata and header included, where the model's tokenizer is there:
llama.cpp's own converter writes the header, and the exporter lays out the tensors. An ONNX
folder's are exact where the onnxruntime-genai builder makes the graph: it makes it here too, over
tensors without values. They are those of both graphs and of their data, padding included; the
tokenizer's files and config.json lie beside them. Of a graph by torch.onnx the tensors alone are
counted (every pair, dense linear, embedding, head, norm and bias, in the types and blocks that the
exporter gives them).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdexport.allocate import Allocation
from svdexport.checkpoint import PairSpec, is_encoder
from svdexport.core.grids_onnx import NBitsGrid
from svdexport.core.remap import bytes_per_rank
from svdexport.errors import InputError, MissingExtraError
from svdexport.export.gguf_size import exact_bytes, header_of
from svdexport.export.gguf_types import NOT_QUANTISED, Types, held
from svdexport.export.onnx_plan import table_grid, why_not
from svdexport.models.blocks import InputGroup, Linear
from svdexport.models.loader import Source
from svdexport.models.shapes import Shapes
from svdexport.pipeline.artifacts import artifact_name
from svdexport.recipe import CheckpointExport, Export, GgufExport, OnnxExport, Recipe
from svdexport.runtimes.ggml import row_bytes
from svdexport.runtimes.gguf_file import GgufFile, nbytes

ONNX_BITS = {"int8": 8, "int4": 4, "int2": 2}
ONNX_HEAD_BITS = 8  # of any quantised precision
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GGUF_PADDING = 32
ROUTERS = (".gate.weight", "_gate.weight")  # of mixtures of experts: F32 in a GGUF

EXACT = {"gguf": "exact", "onnx": "exact: both graphs and their data; tokenizer beside them"}
# what the values alone would tell
EMBEDDING_UNKNOWN = "; embedding in float32, half of that if float16 holds each of its values"
# what comes on top of the tensors' bytes, by format
ON_TOP = {
    "gguf": "tensors; metadata and header come on top",
    "onnx": "tensors; graphs and padding come on top",
    "checkpoint": "tensors; headers and tokenizer come on top",
}

Choice = dict[str, Allocation]


def exports_of(
    recipe: Recipe,
    source: Source,
    shapes: Shapes,
    groups: list[InputGroup],
    chosen: Choice,
    work: Path,
) -> list[dict[str, Any]]:
    """For each export its bytes and those of its dense twin.

    ``weight_bytes`` are those of the tensors; ``file_bytes`` those of the whole file, None where
    they cannot be known; ``note`` says what is missing then.
    """
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    asked = None if recipe.compress.budget is None else recipe.compress.budget.bytes
    base: GgufFile | None = None
    trouble = ""
    if any(spec.format == "gguf" for spec in recipe.export):
        try:
            base = _base(source, shapes, dtype, work)
        except (InputError, MissingExtraError) as error:
            trouble = str(error)
    found = []
    for spec in recipe.export:
        entry: dict[str, Any] = {
            "name": artifact_name(spec),
            "format": spec.format,
            "weight_bytes": weight_bytes(spec, shapes, groups, chosen, dtype),
            "dense_weight_bytes": weight_bytes(spec, shapes, [], {}, dtype),
            "file_bytes": None,
            "dense_file_bytes": None,
            "note": ON_TOP[spec.format],
            "other_types": other_types(spec, shapes, groups, chosen),
        }
        if isinstance(spec, GgufExport) and asked is not None and spec.type == "mixed":
            entry |= {"weight_bytes": asked, "note": "the budget; types are chosen in the run"}
        elif isinstance(spec, GgufExport):
            entry |= _file(spec, base, groups, chosen, trouble)
        elif isinstance(spec, OnnxExport):
            entry |= _folder(spec, source, shapes, dtype, groups, chosen, work)
        fixed = recipe.compress.allocate == "uniform" or recipe.compress.method == "none"
        if entry["file_bytes"] is not None and not fixed:
            entry["note"] = entry["note"].replace("exact", "exact for these ranks", 1)
            entry["note"] += "; the run chooses its own"
        found.append(entry)
    return found


def _base(source: Source, shapes: Shapes, dtype: str, work: Path) -> GgufFile:
    if source.gguf is not None:
        return GgufFile(source.gguf)
    return header_of(source.folder, shapes.parameters, dtype, work)


def _file(
    spec: GgufExport,
    base: GgufFile | None,
    groups: list[InputGroup],
    chosen: Choice,
    trouble: str,
) -> dict[str, Any]:
    """Exact bytes of a GGUF, or why they are not known."""
    if base is None:
        return {"note": f"{ON_TOP['gguf']} ({trouble})"}
    low_rank = _pairs(groups, chosen)
    dims = {m.name: (m.out_features, m.in_features) for g in groups for m in g.members}
    try:
        return {
            "file_bytes": exact_bytes(spec, base, low_rank, dims),
            "dense_file_bytes": exact_bytes(spec, base, {}, {}),
            "note": EXACT["gguf"],
        }
    except InputError as error:
        return {"note": f"{ON_TOP['gguf']} ({error})"}


def _pairs(groups: list[InputGroup], chosen: Choice) -> dict[str, PairSpec]:
    """The pairs of a choice, by linear."""
    found: dict[str, PairSpec] = {}
    for group in groups:
        rank = chosen[group.leader].rank
        if rank is not None:
            found |= {member.name: PairSpec(rank, group.leader) for member in group.members}
    return found


def _folder(
    spec: OnnxExport,
    source: Source,
    shapes: Shapes,
    dtype: str,
    groups: list[InputGroup],
    chosen: Choice,
    work: Path,
) -> dict[str, Any]:
    """Exact bytes of an ONNX folder's graphs and data, or why they are not known."""
    try:
        from svdexport.export.onnx_size import exact_bytes as bytes_of

        low_rank = _pairs(groups, chosen)
        both = [
            bytes_of(spec, source.folder, dtype, shapes.parameters, pairs, work)
            for pairs in (low_rank, {})
        ]
    except ImportError as error:
        return {"note": f"{ON_TOP['onnx']} ({error.name} is not installed)"}
    except (InputError, MissingExtraError) as error:
        return {"note": f"{ON_TOP['onnx']} ({error})"}
    note = EXACT["onnx"]
    if shapes.head is not None and dtype != "float16" and spec.precision != "fp16":
        note += EMBEDDING_UNKNOWN
    return {"file_bytes": both[0], "dense_file_bytes": both[1], "note": note}


def weight_bytes(
    spec: Export, shapes: Shapes, groups: list[InputGroup], chosen: Choice, dtype: str
) -> int:
    """Bytes of the tensors of one export; ``dtype`` is the source model's."""
    if isinstance(spec, GgufExport):
        sizes: Counter[tuple[str, str]] = Counter()  # experts of a layer stand in one tensor
        for name, kind, *_, size in _gguf_tensors(spec, shapes, groups, chosen):
            sizes[kind, re.sub(r"\.experts\.\d+\.", ".experts.", name)] += size
        return sum(-(-size // GGUF_PADDING) * GGUF_PADDING for size in sizes.values())
    matrices = list(_matrices(shapes, groups, chosen))
    if isinstance(spec, OnnxExport):
        return _onnx(spec, shapes, matrices, dtype)
    assert isinstance(spec, CheckpointExport)
    width = _DTYPE_BYTES.get(dtype if spec.dtype == "source" else spec.dtype, 4)
    if spec.layout == "factors":
        return width * sum(math.prod(shape) for _, shape, _ in matrices)
    rest = sum(math.prod(shape) for _, shape, kind in matrices if kind not in ("a", "b"))
    return width * rest + sum(_slots(group, chosen[group.leader].rank or 0) for group in groups)


def _slots(group: InputGroup, rank: int) -> int:
    """Bytes of a group's pair in the remapped layout."""
    rows = sum(member.out_features for member in group.members)
    return rank * bytes_per_rank(rows, group.members[0].in_features)


def _matrices(
    shapes: Shapes, groups: list[InputGroup], chosen: Choice
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every tensor: kinds a, b, linear, embedding, head and other."""
    pairs: dict[str, tuple[str, Linear, int]] = {}  # leader, linear (or the embedding), rank
    for group in groups:
        rank = chosen[group.leader].rank
        if rank is not None:
            pairs |= {member.name: (group.leader, member, rank) for member in group.members}
    linears = {linear.name: linear for linear in shapes.structure.linears()}
    for name, shape in shapes.parameters.items():
        owner = name.removesuffix(".weight")
        if owner in pairs:
            leader, linear, rank = pairs[owner]
            if owner == leader:
                yield name, (rank, linear.in_features), "a"
            yield name, (linear.out_features, rank), "b"
        elif owner in linears:
            yield name, (linears[owner].out_features, linears[owner].in_features), "linear"
        elif name == shapes.embedding:
            yield name, shape, "embedding"
        else:
            yield name, shape, "head" if name == shapes.head else "other"


def _stock(
    shapes: Shapes, matrices: list[tuple[str, tuple[int, ...], str]], spec: GgufExport
) -> list[tuple[str, tuple[int, ...], str]]:
    """Every linear dense; as an adapter the pairs stand beside, with an A for each linear."""
    dense = list(_matrices(shapes, [], {}))
    if spec.form == "stock":
        return dense
    inputs = {f"{x.name}.weight": x.in_features for x in shapes.structure.linears()}
    found = dense
    for name, shape, kind in matrices:
        if kind == "b":
            rows, rank = shape
            if spec.base == "weight":  # fitted alone, not together with those that share an A
                rank = min(rank, rows, inputs[name])
            found += [(name, (rows, rank), "b"), (name, (rank, inputs[name]), "a")]
    return found


def other_types(
    spec: Export, shapes: Shapes, groups: list[InputGroup], chosen: Choice
) -> list[str]:
    """Which tensors get another type than asked, as its blocks do not fill their rows."""
    if not isinstance(spec, GgufExport):
        return []
    found: Counter[tuple[str, str, str]] = Counter()
    extra: Counter[tuple[str, str, str]] = Counter()
    for _, kind, shape, asked, given, size in _gguf_tensors(spec, shapes, groups, chosen):
        if given != asked:
            found[kind, asked, given] += 1
            extra[kind, asked, given] += size - nbytes(asked, math.prod(shape))
    names = {"a": "first factors", "b": "second factors", "linear": "dense linears"}
    return [
        f"{count} {names.get(kind, kind)} of type {given} instead of {asked}, whose blocks their "
        f"rows do not fill ({extra[kind, asked, given]:+,} bytes)"
        for (kind, asked, given), count in sorted(found.items())
    ]


def _gguf_tensors(
    spec: GgufExport, shapes: Shapes, groups: list[InputGroup], chosen: Choice
) -> Iterator[tuple[str, str, tuple[int, ...], str, str, int]]:
    """(name, kind, shape, type asked, type given, bytes) of every tensor."""
    matrices = list(_matrices(shapes, groups, chosen))
    if spec.form != "pairs":
        matrices = _stock(shapes, matrices, spec)
    types = Types.of(spec, tied=shapes.head is None)
    asked = {
        "a": types.a,
        "b": types.b,
        "linear": types.linear,
        "embedding": types.embedding,
        "head": types.head,
        "other": types.linear,
    }
    for name, shape, kind in matrices:
        keeps = len(shape) < 2 or any(part in name for part in NOT_QUANTISED)
        wanted = "F32" if keeps or name.endswith(ROUTERS) else asked[kind]
        given = held(wanted, shape[-1])
        size = row_bytes(given, shape[-1]) * math.prod(shape[:-1])
        yield name, kind, shape, wanted, given, size


def _onnx(
    spec: OnnxExport, shapes: Shapes, matrices: list[tuple[str, tuple[int, ...], str]], dtype: str
) -> int:
    bits = ONNX_BITS.get(spec.precision)
    width = 2 if spec.precision == "fp16" else 4
    traced = why_not(
        shapes.config, latent=spec.kv_cache == "latent", standard=spec.operators == "standard"
    )
    total = 0 if traced else width * rotary_numbers(shapes.config)
    encoder = is_encoder(shapes.config.to_dict())
    for _, shape, kind in matrices:
        tied = kind == "embedding" and shapes.head is None
        if encoder and spec.operators == "standard":
            tied = False  # its embedding stays float
        size = math.prod(shape)
        if bits is not None and kind in ("a", "b", "linear"):
            total += _product(shape, NBitsGrid(bits, spec.block_size), spec)
        elif bits is not None and (kind == "head" or tied):
            asked = NBitsGrid(ONNX_HEAD_BITS, spec.block_size)
            grid = table_grid(asked, shape[1]) if tied and traced else asked
            total += size * width if grid is None else _product(shape, grid, spec)
        elif kind == "embedding" and not tied:  # half precision where that is exact
            total += size * (2 if dtype == "float16" else width)
        else:
            total += size * width
    return total


def _product(shape: tuple[int, ...], grid: NBitsGrid, spec: OnnxExport) -> int:
    """Blocks of packed integers with a float32 scale each; ONNX's own operators do not pad."""
    rows, columns = shape
    if spec.operators == "standard":
        return -(-rows * columns * grid.bits // 8) + rows * grid.blocks(columns) * 4
    return grid.nbytes(rows, columns)


def rotary_numbers(config: Any) -> int:
    """Entries of the tables of cosines and sines that the builder stores."""
    width = getattr(config, "head_dim", None)
    if not width:
        width = config.hidden_size // config.num_attention_heads
    return 2 * int(config.max_position_embeddings) * (int(width) // 2)
