"""Checks of files before any library opens them: safetensors here, GGUF and ONNX beside.

The header of a safetensors file: 8 bytes of length (little endian), then that many bytes of JSON,
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}``, then the
data. The format asks that tensors cover the data without gaps or overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdexport.errors import InputError
from svdexport.safety.documents import parse_json, quoted
from svdexport.safety.gguf_header import GgufHeader, GgufTensor, check_gguf
from svdexport.safety.onnx_data import check_onnx
from svdexport.safety.paths import check_regular

__all__ = [
    "GgufHeader",
    "GgufTensor",
    "SafetensorsHeader",
    "TensorInfo",
    "check_gguf",
    "check_onnx",
    "check_safetensors",
]

# The format allows 100 MB; 32 MiB hold the names of 200,000 tensors and bound time and memory.
MAX_HEADER = 32 * 2**20
MAX_DIMS = 16
BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 8),
    **dict.fromkeys(["F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a safetensors file; ``offset`` is from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The checked header of a safetensors file."""

    path: Path
    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)


def check_safetensors(path: Path) -> SafetensorsHeader:
    """Read and check a safetensors header; the data itself is not read.

    Raises:
        InputError: naming the file and what in its header is wrong.
    """
    path = Path(path)
    size = check_regular(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise InputError(f"{path}: too short for a safetensors file ({size} bytes)")
        if length > size - 8:
            raise InputError(f"{path}: header of {length} bytes in a file of {size}")
        if length > MAX_HEADER:
            raise InputError(f"{path}: header of {length} bytes is over {MAX_HEADER}")
        text = file.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise InputError(f"{path}: no safetensors header")
    data = parse_json(text, str(path))
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map text to text")
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in data.items()}
    _check_cover(path, tensors, start, size)
    return SafetensorsHeader(path, tensors, metadata)


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where} has the unknown dtype {quoted(dtype)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise InputError(f"{where} has a bad shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where} has bad data_offsets")
    # Dimensions below 2**63 and at most 16 of them: the product stays small for Python's integers.
    bits = math.prod(shape) * BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise InputError(
            f"{where} of shape {shape} and dtype {dtype} does not take the {nbytes} bytes of its "
            f"offsets"
        )
    return TensorInfo(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_cover(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Data from ``start`` to the end of the file, each byte in exactly one tensor."""
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            kind = "overlaps the one before" if info.offset < end else "leaves a gap before it"
            raise InputError(f"{path}: the data of tensor {quoted(name)} {kind}")
        end += info.nbytes
    if end > size:
        raise InputError(f"{path}: tensors end at byte {end}, the file at {size}: cut short")
    if end < size:
        raise InputError(f"{path}: {size - end} bytes after the last tensor belong to none")
