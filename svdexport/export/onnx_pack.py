"""External data of an ONNX model, streamed: one initialiser at a time, its record kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from svdexport.core.grids_onnx import (
    NBitsGrid,
    NBitsTensor,
    PackedNBits,
    pack,
    pack_bits,
    quantize,
    unpack,
)
from svdexport.errors import InputError
from svdexport.export.base import TensorRecord
from svdexport.packed import PackedFolder

_PAGE = 4096
"""onnxruntime maps external data; large tensors start on a page."""

_SMALL = 64
"""Cache line, the alignment of tensors too small to deserve a page."""

_LARGE_BYTES = 1 << 20

_SIGNED = {8: ir.DataType.INT8, 4: ir.DataType.INT4, 2: ir.DataType.INT2}


_LARGEST_HALF = float(np.finfo(np.float16).max)


class DataWriter:
    """Appends tensors to the external data file of a model and remembers what was meant.

    Args:
        folder: folder of the model.
        name: name of the data file in it.

    Attributes:
        records: initialiser name -> its record.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.records: dict[str, TensorRecord] = {}
        self._file: BinaryIO = (folder / name).open("wb")

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def note(self, name: str, array: np.ndarray) -> None:
        """Remember a small tensor that stays inside the graph."""
        dtype = ir.DataType.from_numpy(array.dtype)
        self.records[name] = TensorRecord.of(array.shape, dtype.name, array.tobytes())

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """Write ``array`` under ``name``. Raises ValueError where the name was used before."""
        array = np.ascontiguousarray(array)
        dtype = ir.DataType.from_numpy(array.dtype)
        data = array.reshape(-1).view(np.uint8)
        return self._append(name, data, dtype, array.shape)

    def add_codes(self, name: str, codes: np.ndarray, bits: int) -> ir.ExternalTensor:
        """Write signed integers of 8, 4 or 2 bits; ``codes`` is int8. Raises as ``add`` does."""
        data = pack_bits(codes.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1), bits)
        return self._append(name, data, _SIGNED[bits], codes.shape)

    def _append(
        self, name: str, data: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        if name in self.records:
            raise ValueError(f"initialiser {name} is written twice")
        offset = aligned(self._file.tell(), data.nbytes)
        self._file.write(b"\0" * (offset - self._file.tell()))
        view = memoryview(data)  # type: ignore[arg-type]
        self._file.write(view)
        self.records[name] = TensorRecord.of(shape, dtype.name, view)
        return self.external(name, offset, data.nbytes, dtype, shape)

    def external(
        self, name: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        """What the graph says about a tensor in the data file."""
        return ir.ExternalTensor(
            location=self.name,
            offset=offset,
            length=length,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.folder),
        )


def aligned(offset: int, nbytes: int) -> int:
    """Where a tensor of so many bytes starts, at ``offset`` or behind it."""
    align = _PAGE if nbytes >= _LARGE_BYTES else _SMALL
    return offset + -offset % align


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """An array in float16. Raises InputError where a value is too large for it."""
    if array.size and float(np.abs(array).max()) > _LARGEST_HALF:
        raise InputError(f"{name}: a value beyond float16's {_LARGEST_HALF:.0f}; export fp32")
    return array.astype(np.float16)


def quantized(
    weight: np.ndarray, grid: NBitsGrid, tensors: Sequence[str], ready: PackedFolder | None
) -> NBitsTensor:
    """W (rows, columns) on the grid. ``tensors`` are those of the checkpoint that W stacks; where
    all of them were quantised onto this grid before (``ready``), those values are taken.
    """
    if ready is None or not all(ready.kinds.get(tensor) == grid.name for tensor in tensors):
        return quantize(weight, grid)
    parts = [ready.read(tensor).parts for tensor in tensors]
    packed = PackedNBits(
        np.concatenate([part["weight"] for part in parts]),
        np.concatenate([part["scales"] for part in parts]),
        None if grid.symmetric else np.concatenate([part["zeros"] for part in parts]),
    )
    return unpack(packed, weight.shape[1], grid)


def packed_initializers(weight: np.ndarray | NBitsTensor, grid: NBitsGrid) -> dict[str, np.ndarray]:
    """The initialisers of a MatMulNBits node for W (rows, columns), by their suffix."""
    packed = pack(weight if isinstance(weight, NBitsTensor) else quantize(weight, grid))
    arrays = {f"weight_Q{grid.bits}": packed.weight, "weight_scales": packed.scales}
    if packed.zeros is not None:
        arrays["weight_zero_points"] = packed.zeros
    return arrays
