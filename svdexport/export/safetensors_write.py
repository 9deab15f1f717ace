"""Safetensors files from a stream of tensors, one of which is in memory at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {  # in the order in which safetensors lays types out
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_NAMES.values())
_COPY = 2**24


class SafetensorsWriter:
    """Writes the file that ``safetensors.torch.save_file`` writes, byte for byte.

    Data go to a file beside it first: the header, which stands before them, says where each
    tensor lies, and tensors stand in the order of their types' sizes and their names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(path.name + ".data")
        self._data = self._beside.open("w+b")
        self._infos: dict[str, tuple[str, list[int], int, int]] = {}

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._assemble()
        finally:
            self._data.close()
            self._beside.unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far."""
        return self._data.tell()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Raises ValueError for a type that safetensors has no name for."""
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be stored")
        begin = self._data.tell()
        flat = tensor.detach().contiguous().reshape(-1)
        self._data.write(flat.view(torch.uint8).numpy().data)
        size = self._data.tell() - begin
        shape = [int(n) for n in tensor.shape]
        self._infos[name] = (_NAMES[tensor.dtype], shape, begin, size)

    def _assemble(self) -> None:
        order = sorted(self._infos, key=lambda name: (_ORDER.index(self._infos[name][0]), name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in order:
            dtype, shape, _, size = self._infos[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                _, _, begin, left = self._infos[name]
                self._data.seek(begin)
                while left:
                    block = self._data.read(min(left, _COPY))
                    out.write(block)
                    left -= len(block)
