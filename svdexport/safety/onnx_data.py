"""ONNX models before a library loads them: the protobuf is walked, external data is only located.

A tensor of an ONNX model may keep its bytes in another file, named by ``location``, ``offset`` and
``length``. Loaders differ in what they check, so all of it is checked here, for every tensor that
any part of the model can hold: initializers, attributes, sub-graphs, functions, training graphs.
The walk needs no protobuf library and keeps nothing but the entries of external tensors.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdexport.errors import InputError
from svdexport.safety.documents import quoted, read_json
from svdexport.safety.paths import check_name, check_regular, data_file

MAX_PROTO = 2**31 - 1  # what a protobuf message can be
MAX_FIELDS = 1_500_000
MAX_DEPTH = 48
MAX_TEXT = 65_536
EXTERNAL = 1

# Which fields of each message (onnx.proto) lead to tensors: message -> {field: message}.
_TENSOR, _SPARSE, _GRAPH, _NODE, _ATTRIBUTE = "tensor", "sparse", "graph", "node", "attribute"
_FUNCTION, _TRAINING, _MODEL = "function", "training", "model"
_CHILDREN: dict[str, dict[int, str]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {
        **{5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH},
        **{22: _SPARSE, 23: _SPARSE},
    },
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}

# TensorProto.DataType -> bits per element; text (8) cannot be external.
_BITS = {
    **dict.fromkeys([2, 3, 9, 17, 18, 19, 20, 24], 8),
    **dict.fromkeys([4, 5, 10, 16], 16),
    **dict.fromkeys([1, 6, 12], 32),
    **dict.fromkeys([7, 11, 13, 14], 64),
    15: 128,
    **dict.fromkeys([21, 22, 23], 4),
    **dict.fromkeys([25, 26], 2),
}


def check_onnx(path: Path) -> None:
    """Check an ONNX file, or a folder with ``*.onnx`` files and perhaps a ``genai_config.json``.

    Raises:
        InputError: malformed protobuf, a model over 2 GB, external data outside the folder, through
            a link or out of range, or a config that loads native code or files elsewhere.
    """
    path = Path(path)
    if not path.is_dir():
        _check_file(path)
        return
    models = sorted(entry for entry in path.iterdir() if entry.name.endswith(".onnx"))
    if not models:
        raise InputError(f"{path}: no *.onnx file")
    config = path / "genai_config.json"
    if config.is_symlink() or config.exists():
        _check_genai(config)
    for model in models:
        _check_file(model)


def _check_genai(config: Path) -> None:
    """File names below the folder, and no library to load (onnxruntime-genai would run it)."""
    if config.is_symlink():
        raise InputError(f"{config}: a symbolic link; copy the file")
    for key, value in _leaves(read_json(config)):
        text = value.lower()
        if "custom_ops" in key or text.endswith((".so", ".dll", ".dylib")) or ".so." in text:
            raise InputError(f"{config}: {quoted(key)} loads native code: {quoted(value)}")
        if key.endswith("filename") and value:
            check_name(value, str(config))


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and texts of a JSON document."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _leaves(value, key)
    elif isinstance(data, str):
        yield key, data


def _check_file(path: Path) -> None:
    size = check_regular(path)
    if size > MAX_PROTO:
        raise InputError(f"{path}: over 2 GB; weights of that size belong in external data")
    if size == 0:
        raise InputError(f"{path}: empty, not an ONNX model")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        _Walk(path, data).run()


class _Walk:
    """Steps through the messages that can hold tensors."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._fields = 0
        self._sizes: dict[str, int] = {}

    def run(self) -> None:
        """Visit all messages from the model down."""
        todo = [(_MODEL, 0, len(self._data), 0)]
        graphs = 0
        while todo:
            message, begin, end, depth = todo.pop()
            if depth > MAX_DEPTH:
                raise self._error("graphs nested too deeply")
            children = _CHILDREN[message]
            for number, wire, value, stop in self._read(begin, end):
                child = children.get(number)
                if child is None or wire != 2:
                    continue
                if child == _TENSOR:
                    self._tensor(value, stop)
                else:
                    graphs += child == _GRAPH
                    todo.append((child, value, stop, depth + 1))
        if graphs == 0:
            raise self._error("not an ONNX model (it has no graph)")

    def _tensor(self, begin: int, end: int) -> None:
        dims: list[int] = []
        name, data_type, location = "", 0, 0
        entries: dict[str, str] = {}
        for number, wire, value, stop in self._read(begin, end):
            if number == 1 and wire == 0:
                dims.append(value)
            elif number == 1 and wire == 2:
                dims.extend(self._packed(value, stop))
            elif number == 2 and wire == 0:
                data_type = value
            elif number == 8 and wire == 2:
                name = bytes(self._data[value : min(stop, value + 200)]).decode(errors="replace")
            elif number == 14 and wire == 0:
                location = value
            elif number == 13 and wire == 2:
                key, text = self._entry(value, stop)
                if key in entries:
                    raise self._error(f"tensor {quoted(name)} states {quoted(key)} twice")
                entries[key] = text
        if entries or location == EXTERNAL:
            self._external(f"{self._path}: tensor {quoted(name)}", dims, data_type, entries)

    def _external(
        self, where: str, dims: list[int], data_type: int, entries: dict[str, str]
    ) -> None:
        """The stated range must exist and hold what the shape needs."""
        name = entries.get("location", "")
        if self._path.is_symlink():
            # A loader may look for the data beside the link or beside what it leads to.
            raise InputError(f"{self._path}: a link to a model with external data; copy the files")
        if name not in self._sizes:
            self._sizes[name] = data_file(self._path.parent, name, where).stat().st_size
        size = self._sizes[name]
        offset = _count(entries.get("offset", "0"), f"{where}: external offset")
        if offset > size:
            raise InputError(
                f"{where}: external offset {offset} is past the {size} bytes of {name}"
            )
        length = size - offset
        if "length" in entries:
            length = _count(entries["length"], f"{where}: external length")
        if offset + length > size:
            raise InputError(
                f"{where}: external data to byte {offset + length}, but {name} has {size}"
            )
        if data_type not in _BITS:
            raise InputError(f"{where}: data type {data_type} cannot be external")
        if len(dims) > 64 or any(dim >= 2**63 for dim in dims):
            raise InputError(f"{where}: impossible shape")
        needed = (math.prod(dims) * _BITS[data_type] + 7) // 8
        if needed > length or ("length" in entries and needed != length):
            raise InputError(f"{where}: shape {dims} takes {needed} bytes, {length} are stated")

    def _entry(self, begin: int, end: int) -> tuple[str, str]:
        """Key and value of a StringStringEntryProto."""
        texts = {1: "", 2: ""}
        for number, wire, value, stop in self._read(begin, end):
            if number in texts and wire == 2:
                if stop - value > MAX_TEXT:
                    raise self._error("an external data entry of more than 64 kB")
                try:
                    texts[number] = bytes(self._data[value:stop]).decode("utf-8")
                except UnicodeDecodeError:
                    raise self._error("an external data entry that is not UTF-8 text") from None
        return texts[1], texts[2]

    def _packed(self, begin: int, end: int) -> list[int]:
        values = []
        while begin < end:
            value, begin = self._varint(begin, end)
            values.append(value)
            if len(values) > 64:
                raise self._error("a tensor of more than 64 dimensions")
        return values

    def _read(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Fields of a message: number, wire type, value (or where its bytes begin), their end."""
        data = self._data
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self._error(f"more than {MAX_FIELDS} protobuf fields outside of weights")
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = self._varint(at - 1, end)
            number, wire = tag >> 3, tag & 7
            value, stop = 0, at
            if wire == 0:
                value, at = self._varint(at, end)
                stop = at
            elif wire in (1, 5):
                value, stop = at, at + (8 if wire == 1 else 4)
                at = stop
            elif wire == 2:
                length, value = self._varint(at, end)
                stop = value + length
                at = stop
            else:
                raise self._error("malformed protobuf: not an ONNX model")
            if at > end or number == 0:
                raise self._error("malformed protobuf: not an ONNX model, or cut short")
            yield number, wire, value, stop

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise self._error("malformed protobuf: not an ONNX model, or cut short")

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self._path}: {problem}")


def _count(text: str, where: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise InputError(f"{where} {quoted(text)} is not a number of bytes")
    return int(text)
