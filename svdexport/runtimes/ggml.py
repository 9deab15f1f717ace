"""ggml's own quantiser and the installed llama.cpp library, through ctypes."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from svdexport.errors import InputError, MissingExtraError
from svdexport.runtimes.gguf_file import BLOCKS, TYPE_NUMBERS

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 at a time
LOW_RANK_SYMBOL = "llama_supports_low_rank"


def bindings() -> Any:
    """llama-cpp-python's low-level module. Raises MissingExtraError where it is not installed."""
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        raise MissingExtraError("gguf", "running or quantising a GGUF file") from None
    return llama_cpp


def supports_low_rank() -> bool:
    """Whether the installed llama.cpp runs factor pairs; a stock library lacks the symbol."""
    symbol = getattr(bindings()._lib, LOW_RANK_SYMBOL, None)
    if symbol is None:
        return False
    symbol.restype = ctypes.c_bool
    symbol.argtypes = []
    return bool(symbol())


def fits(type_name: str, row_length: int) -> bool:
    """Whether rows of this length are a whole number of the type's blocks."""
    return row_length % BLOCKS[type_name][0] == 0


def row_bytes(type_name: str, row_length: int) -> int:
    """Bytes of a row. Raises InputError where the type cannot hold it."""
    elements, size = BLOCKS[type_name]
    if row_length % elements:
        raise InputError(
            f"type {type_name} holds rows of a multiple of {elements}, not of {row_length}"
        )
    return row_length // elements * size


def quantize(
    values: np.ndarray, type_name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Rows in a ggml type, by ``ggml_quantize_chunk``: the very bytes that llama.cpp would write.

    Takes as many threads as torch does; rows do not depend on one another.

    Args:
        values: (rows, n), any float type.
        type_name: ggml type, for example ``Q4_K``.
        importance: (n,) weight of each input channel, at least 0; used by the types that take one.

    Returns:
        uint8 (rows, bytes of a row).

    Raises:
        InputError: the row length does not fit the type, or a value cannot be held.
    """
    lib = _quantizer()
    rows, n = values.shape
    out = np.empty((rows, row_bytes(type_name, n)), dtype=np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        if weights.shape != (n,):
            raise ValueError(f"importance {weights.shape} for rows of {n}")
    threads = torch.get_num_threads()
    step = max(1, min(CHUNK_ELEMENTS // n, -(-rows // threads)))

    def quantize_from(start: int) -> None:
        chunk = np.ascontiguousarray(values[start : start + step], dtype=np.float32)
        _check_range(chunk, type_name)
        part = out[start : start + step]
        written = lib(
            TYPE_NUMBERS[type_name],
            chunk.ctypes.data,
            part.ctypes.data,
            0,
            chunk.shape[0],
            n,
            None if weights is None else weights.ctypes.data,
        )
        if written != part.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {type_name}, not {part.nbytes}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(quantize_from, range(0, rows, step)))
    return out


def _check_range(chunk: np.ndarray, type_name: str) -> None:
    peak = float(np.abs(chunk).max(initial=0.0))
    if not np.isfinite(peak):
        raise InputError("holds NaN or Inf")
    if type_name == "F16" and peak > 65504.0:
        raise InputError(f"holds {peak:.4g}, past F16's largest number 65504")


def _quantizer() -> Any:
    function = bindings()._lib.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # src, float32
        ctypes.c_void_p,  # dst
        ctypes.c_int64,  # start
        ctypes.c_int64,  # nrows
        ctypes.c_int64,  # n_per_row
        ctypes.c_void_p,  # importance or NULL
    ]
    return function
