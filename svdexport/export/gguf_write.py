"""Write a GGUF file as a stream: one tensor in memory at a time, metadata taken byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdexport.errors import InputError
from svdexport.export.base import TensorRecord
from svdexport.runtimes.ggml import quantize, row_bytes
from svdexport.runtimes.gguf_file import STRING, TYPE_NUMBERS, U32, U64

MAGIC, VERSION = b"GGUF", 3

Values = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written.

    Attributes:
        name: in the file.
        ne: dimensions in ggml's order, the row length first.
        type: ggml type.
        values: gives the rows in their turn: raw bytes (uint8) or values (float) to quantise.
        importance: (ne[0],) weights of the input channels for the quantiser, or (ne[2], ne[0])
            of each slice's, or None.
    """

    name: str
    ne: tuple[int, ...]
    type: str
    values: Values
    importance: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return row_bytes(self.type, self.ne[0]) * int(np.prod(self.ne[1:], dtype=np.int64))


def text(value: str) -> bytes:
    """A string as GGUF holds it."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def u32(key: str, value: int) -> bytes:
    """A whole metadata entry of type uint32."""
    return text(key) + struct.pack("<II", U32, value)


def u64(key: str, value: int) -> bytes:
    """A whole metadata entry of type uint64."""
    return text(key) + struct.pack("<IQ", U64, value)


def string(key: str, value: str) -> bytes:
    """A whole metadata entry of type string."""
    return text(key) + struct.pack("<I", STRING) + text(value)


def write(
    path: Path, metadata: Iterable[bytes], tensors: list[Planned], alignment: int
) -> dict[str, TensorRecord]:
    """Write the file.

    Args:
        path: the file to create.
        metadata: whole entries, in order.
        tensors: in order; each one's values are asked for once.
        alignment: of the data, in bytes; must agree with the metadata.

    Returns:
        what was written, per tensor.

    Raises:
        InputError: a tensor cannot be held in its type (the line names it).
    """
    records = {}
    with path.open("wb") as out:
        out.write(header(metadata, tensors, alignment))
        for tensor in tensors:
            data = np.ascontiguousarray(_bytes_of(tensor)).data.cast("B")
            if data.nbytes != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: {data.nbytes} bytes, not {tensor.nbytes}")
            records[tensor.name] = TensorRecord.of(tensor.ne, tensor.type, data)
            out.write(data)
            out.write(bytes(_padded(data.nbytes, alignment) - data.nbytes))
    return records


def header(metadata: Iterable[bytes], tensors: list[Planned], alignment: int) -> bytes:
    """What stands before the data, padding included."""
    entries = list(metadata)
    found = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(entries)))
    found += b"".join(entries)
    offset = 0
    for tensor in tensors:
        kind = TYPE_NUMBERS[tensor.type]
        found += text(tensor.name) + struct.pack("<I", len(tensor.ne))
        found += struct.pack(f"<{len(tensor.ne)}QIQ", *tensor.ne, kind, offset)
        offset += _padded(tensor.nbytes, alignment)
    return bytes(found) + bytes(_padded(len(found), alignment) - len(found))


def file_bytes(metadata: Iterable[bytes], tensors: list[Planned], alignment: int) -> int:
    """Size of the file that :func:`write` would make."""
    data = sum(_padded(tensor.nbytes, alignment) for tensor in tensors)
    return len(header(metadata, tensors, alignment)) + data


def _bytes_of(tensor: Planned) -> np.ndarray:
    values = tensor.values()
    if values.dtype == np.uint8:
        return values
    rows, weights = values.reshape(-1, tensor.ne[0]), tensor.importance
    try:
        if weights is None or weights.ndim == 1:
            return quantize(rows, tensor.type, weights)
        slices = zip(np.split(rows, len(weights)), weights, strict=True)
        return np.concatenate([quantize(part, tensor.type, own) for part, own in slices])
    except InputError as error:
        raise InputError(f"tensor {tensor.name}: {error}") from None


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
