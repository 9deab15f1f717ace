"""No NaN and no infinity in weights: one would spread through every moment and every factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError
from svdexport.safety.documents import quoted
from svdexport.safety.headers import SafetensorsHeader, TensorInfo

_CHUNK = 2**22  # elements looked at together

# Floating-point formats -> (unsigned type of the same width, mask of the exponent's bits): a number
# is NaN or infinite exactly where all of these bits are set.
_EXPONENT: dict[str, tuple[Any, int]] = {
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
}


def check_finite(where: Path | str, name: str, array: Any) -> None:
    """Refuse a weight with a NaN or an infinity.

    Args:
        where: the file it came from.
        name: the tensor's name.
        array: a NumPy array or a torch tensor, of any shape.

    Raises:
        InputError: naming file, tensor, and the index of the first such element.
    """
    flat = array.reshape(-1)
    for begin in range(0, flat.shape[0], _CHUNK):
        part = flat[begin : begin + _CHUNK]
        # torch's own isfinite also knows bfloat16, which NumPy lacks.
        finite = np.asarray(part.isfinite() if hasattr(part, "isfinite") else np.isfinite(part))
        if not finite.all():
            raise _error(where, name, tuple(array.shape), begin + int(finite.argmin()))


def check_file_finite(header: SafetensorsHeader) -> None:
    """The same for all floating-point tensors of a safetensors file, read in chunks.

    Raises:
        InputError: naming file, tensor and index.
    """
    with header.path.open("rb") as file:
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].offset):
            if info.dtype in _EXPONENT:
                _scan(file, header.path, name, info)


def _scan(file: Any, path: Path, name: str, info: TensorInfo) -> None:
    dtype, mask = _EXPONENT[info.dtype]
    count = info.nbytes // dtype.itemsize
    file.seek(info.offset)
    for begin in range(0, count, _CHUNK):
        data = file.read(min(_CHUNK, count - begin) * dtype.itemsize)
        odd = (np.frombuffer(data, dtype) & mask) == mask
        if odd.any():
            raise _error(path, name, info.shape, begin + int(odd.argmax()))


def _error(where: Path | str, name: str, shape: tuple[int, ...], at: int) -> InputError:
    index = [int(part) for part in np.unravel_index(at, shape)] if shape else []
    return InputError(f"{where}: tensor {quoted(name)} has a NaN or infinity at {index}")
