"""A GGUF file seen through its checked header: metadata, tensors and their raw bytes, mapped."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError, MissingExtraError
from svdexport.safety.gguf_header import TYPES, GgufTensor, check_gguf

BLOCKS = {name: (elements, size) for name, elements, size in TYPES.values()}
TYPE_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct formats
U32, U64, F32, STRING, ARRAY = 4, 10, 6, 8, 9
HEADER_BYTES = 24  # magic, version, tensor count, key count

# An export for a stock llama.cpp says its form; ``stock_lora`` has its pairs in a second file.
FORM_KEY = "svdexport.form"
LORA_FORM = "stock_lora"


class GgufFile:
    """An opened GGUF file.

    Args:
        path: the file; its header is checked first, data is not read.

    Attributes:
        path: the file.
        tensors: name -> type, dimensions (row length first) and place, in the file's order.
        kv_bytes: metadata key -> the raw bytes of the whole entry (key, type, value), in order.
        alignment: of tensor data, in bytes.

    Raises:
        InputError: naming the file and what in its header is wrong.
    """

    def __init__(self, path: Path) -> None:
        header = check_gguf(path)
        self.path = path
        self.alignment = header.alignment
        self.tensors: dict[str, GgufTensor] = header.tensors
        self._map = np.memmap(path, mode="r")
        self._view = np.asarray(self._map).data
        self._values: dict[str, tuple[int, int]] = {}
        self.kv_bytes: dict[str, bytes] = {}
        at = HEADER_BYTES
        for _ in header.keys:
            at = self._read_entry(at)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; strings as str, arrays as lists."""
        if key not in self._values:
            return default
        kind, at = self._values[key]
        return self._value(kind, at)[0]

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture", "unknown"))

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, as uint8 (rows, bytes of a row); mapped, not read."""
        info = self.tensors[name]
        data = np.asarray(self._map)[info.offset : info.offset + info.nbytes]
        return data.reshape(row_count(info), -1)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start:stop`` of a tensor as float32 (rows, row length), dequantised."""
        return to_float32(self.raw(name)[start:stop], self.tensors[name].type)

    def _read_entry(self, start: int) -> int:
        key, at = self._value(STRING, start)
        (kind,) = struct.unpack_from("<I", self._view, at)
        self._values[key] = (kind, at + 4)
        end = self._skip(kind, at + 4)
        self.kv_bytes[key] = bytes(self._view[start:end])
        return end

    def _skip(self, kind: int, at: int) -> int:
        """Offset after a value; strings are not decoded."""
        if kind in SCALARS:
            return at + struct.calcsize("<" + SCALARS[kind])
        if kind == STRING:
            return at + 8 + int(struct.unpack_from("<Q", self._view, at)[0])
        item, count = struct.unpack_from("<IQ", self._view, at)
        at += 12
        if item in SCALARS:
            return at + int(count) * struct.calcsize("<" + SCALARS[item])
        for _ in range(count):
            at = self._skip(item, at)
        return at

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        """A value and the offset after it."""
        if kind in SCALARS:
            form = struct.Struct("<" + SCALARS[kind])
            return form.unpack_from(self._view, at)[0], at + form.size
        if kind == STRING:
            end = self._skip(STRING, at)
            return bytes(self._view[at + 8 : end]).decode("utf-8", "replace"), end
        item, count = struct.unpack_from("<IQ", self._view, at)
        at += 12
        values = []
        for _ in range(count):
            value, at = self._value(item, at)
            values.append(value)
        return values, at


def adapter_path(path: Path) -> Path:
    """Where a ``stock_lora`` export has its adapter: ``model.gguf`` -> ``model.lora.gguf``."""
    return path.with_suffix(".lora.gguf")


def adapter_of(path: Path) -> Path | None:
    """The adapter beside a written file, where the file says that it has one."""
    if GgufFile(path).value(FORM_KEY) != LORA_FORM:
        return None
    return adapter_path(path)


def element_count(info: GgufTensor) -> int:
    """Numbers in a tensor."""
    return int(np.prod(info.ne, dtype=np.int64))


def row_count(info: GgufTensor) -> int:
    """Rows of a tensor, those of all its slices together."""
    return element_count(info) // info.ne[0]


def nbytes(type_name: str, elements: int) -> int:
    """Bytes of so many elements, a whole number of blocks."""
    count, size = BLOCKS[type_name]
    return elements // count * size


def to_float32(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Raw rows (rows, bytes) of a ggml type as float32 (rows, elements)."""
    if type_name == "F32":
        return np.ascontiguousarray(raw).view(np.float32)
    if type_name == "F16":
        return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "reading a quantised GGUF file") from None
    try:
        kind = gguf.GGMLQuantizationType[type_name]
        values: np.ndarray = gguf.quants.dequantize(np.ascontiguousarray(raw), kind)
    except (KeyError, NotImplementedError):
        raise InputError(f"type {type_name} cannot be dequantised") from None
    return values.astype(np.float32, copy=False)
