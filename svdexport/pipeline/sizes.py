"""Bytes of the exports of a plan, from shapes alone.

Exact are the tensors' bytes of a GGUF and of an ONNX folder: every pair, dense linear, embedding,
head, norm and bias, in the types and blocks that the exporters give them. On top of these come
what only the exporters know: a GGUF's metadata (mostly the tokenizer, a megabyte or two), an ONNX
folder's two graphs and the padding between tensors (under 1 %). A model whose graph the
onnxruntime-genai builder does not make, and architectures to which llama.cpp adds tensors of its
own, are off by those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from svdexport.allocate import Allocation
from svdexport.core.grids_onnx import NBitsGrid
from svdexport.export.gguf_types import NOT_QUANTISED, Types, held
from svdexport.models.blocks import InputGroup
from svdexport.models.shapes import Shapes
from svdexport.recipe import CheckpointExport, Export, GgufExport, OnnxExport
from svdexport.runtimes.ggml import row_bytes

ONNX_BITS = {"int8": 8, "int4": 4, "int2": 2}
ONNX_HEAD_BITS = 8  # of any quantised precision
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GGUF_PADDING = 32

Choice = dict[str, Allocation]


def weight_bytes(
    spec: Export, shapes: Shapes, groups: list[InputGroup], chosen: Choice, dtype: str
) -> int:
    """Bytes of the tensors of one export; ``dtype`` is the source model's."""
    matrices = list(_matrices(shapes, groups, chosen))
    if isinstance(spec, GgufExport) and spec.form != "pairs":
        matrices = _stock(shapes, matrices, adapter=spec.form == "stock_lora")
    if isinstance(spec, GgufExport):
        return _gguf(spec, shapes, matrices)
    if isinstance(spec, OnnxExport):
        return _onnx(spec, shapes, matrices, dtype)
    assert isinstance(spec, CheckpointExport)
    width = _DTYPE_BYTES.get(dtype if spec.dtype == "source" else spec.dtype, 4)
    return width * sum(math.prod(shape) for _, shape, _ in matrices)


def _matrices(
    shapes: Shapes, groups: list[InputGroup], chosen: Choice
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every tensor: kinds a, b, linear, embedding, head and other."""
    pairs: dict[str, tuple[InputGroup, int]] = {}
    for group in groups:
        rank = chosen[group.leader].rank
        if rank is not None:
            pairs |= {member.name: (group, rank) for member in group.members}
    linears = {linear.name: linear for linear in shapes.structure.linears()}
    for name, shape in shapes.parameters.items():
        owner = name.removesuffix(".weight")
        if owner in pairs:
            group, rank = pairs[owner]
            if owner == group.leader:
                yield name, (rank, linears[owner].in_features), "a"
            yield name, (linears[owner].out_features, rank), "b"
        elif owner in linears:
            yield name, (linears[owner].out_features, linears[owner].in_features), "linear"
        elif name == shapes.embedding:
            yield name, shape, "embedding"
        else:
            yield name, shape, "head" if name == shapes.head else "other"


def _stock(
    shapes: Shapes, matrices: list[tuple[str, tuple[int, ...], str]], adapter: bool
) -> list[tuple[str, tuple[int, ...], str]]:
    """Every linear dense; as an adapter the pairs stand beside, with an A for each linear."""
    dense = list(_matrices(shapes, [], {}))
    if not adapter:
        return dense
    inputs = {f"{x.name}.weight": x.in_features for x in shapes.structure.linears()}
    found = dense
    for name, shape, kind in matrices:
        if kind == "b":
            found += [(name, shape, "b"), (name, (shape[1], inputs[name]), "a")]
    return found


def _gguf(
    spec: GgufExport, shapes: Shapes, matrices: list[tuple[str, tuple[int, ...], str]]
) -> int:
    types = Types.of(spec, tied=shapes.head is None)
    asked = {
        "a": types.a,
        "b": types.b,
        "linear": types.linear,
        "embedding": types.embedding,
        "head": types.head,
        "other": types.linear,
    }
    total = 0
    for name, shape, kind in matrices:
        keeps = len(shape) < 2 or any(part in name for part in NOT_QUANTISED)
        type_name = "F32" if keeps else held(asked[kind], shape[-1])
        size = row_bytes(type_name, shape[-1]) * math.prod(shape[:-1])
        total += -(-size // GGUF_PADDING) * GGUF_PADDING
    return total


def _onnx(
    spec: OnnxExport, shapes: Shapes, matrices: list[tuple[str, tuple[int, ...], str]], dtype: str
) -> int:
    bits = ONNX_BITS.get(spec.precision)
    width = 2 if spec.precision == "fp16" else 4
    total = width * rotary_numbers(shapes.config) if spec.operators == "contrib" else 0
    for _, shape, kind in matrices:
        tied = kind == "embedding" and shapes.head is None
        size = math.prod(shape)
        if bits is not None and kind in ("a", "b", "linear"):
            total += _product(shape, bits, spec)
        elif bits is not None and (kind == "head" or tied):
            total += _product(shape, ONNX_HEAD_BITS, spec)
        elif kind == "embedding" and not tied:  # half precision where that is exact
            total += size * (2 if dtype == "float16" else width)
        else:
            total += size * width
    return total


def _product(shape: tuple[int, ...], bits: int, spec: OnnxExport) -> int:
    """Blocks of packed integers with a float32 scale each; ONNX's own operators do not pad."""
    rows, columns = shape
    blocks = NBitsGrid(bits, spec.block_size).blocks(columns)
    if spec.operators == "standard":
        return -(-rows * columns * bits // 8) + rows * blocks * 4
    return rows * blocks * (spec.block_size * bits // 8 + 4)


def rotary_numbers(config: Any) -> int:
    """Entries of the tables of cosines and sines that the builder stores."""
    width = getattr(config, "head_dim", None)
    if not width:
        width = config.hidden_size // config.num_attention_heads
    return 2 * int(config.max_position_embeddings) * (int(width) // 2)
