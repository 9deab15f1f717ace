"""llama.cpp's own quantisation of a whole file (``llama_model_quantize``), through the library."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError
from svdexport.files import check_exhausted
from svdexport.runtimes.ggml import bindings
from svdexport.runtimes.llama_cpp_rt import quiet_log

# The mixes that llama.cpp's users take, by their number in llama.h's enum llama_ftype.
MIXES = {
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "IQ4_XS": 30,
    "Q4_0": 2,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "Q2_K": 10,
}
_SIZE = re.compile(r"quant size\s*=\s*([0-9.]+) MiB")


def quantized_bytes(source: Path, mix: str) -> int:
    """Bytes of the tensors that ``quantize_file`` would write, to about 5 kB; nothing is written.

    Raises InputError where llama.cpp refuses the file.
    """
    said = _run(source, None, mix, 1, {})
    found = _SIZE.search(said)
    if found is None:
        raise InputError(f"{source}: llama.cpp does not say how large {mix} would be")
    return round(float(found[1]) * 2**20)


def quantize_file(
    source: Path, out: Path, mix: str, threads: int, importance: Mapping[str, np.ndarray]
) -> None:
    """Write ``source`` as llama.cpp's quantiser does.

    Args:
        mix: a key of ``MIXES``.
        importance: tensor -> (n_in,) weights of its input channels, as of an importance matrix.

    Raises:
        InputError: llama.cpp refuses the file.
    """
    _run(source, out, mix, threads, importance)


def _run(
    source: Path, out: Path | None, mix: str, threads: int, importance: Mapping[str, np.ndarray]
) -> str:
    lib = bindings()
    params = lib.llama_model_quantize_default_params()
    params.ftype = MIXES[mix]
    params.nthread = threads
    params.allow_requantize = True  # the user's model may itself be a quantised GGUF
    params.dry_run = out is None
    entries = _entries(lib, importance)
    if importance:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
    said: list[str] = []

    def keep(_level: int, text: bytes, _user: object) -> None:
        said.append(text.decode("utf-8", "replace"))

    callback = lib.llama_log_callback(keep)
    lib.llama_log_set(callback, None)
    try:
        target = os.fsencode(out or source.with_suffix(".unused"))
        code = lib.llama_model_quantize(os.fsencode(source), target, ctypes.byref(params))
    finally:
        quiet_log(lib)
    if code:
        check_exhausted("".join(said), str(out or source))
        last = [line for line in "".join(said).splitlines() if line.strip()][-1:]
        raise InputError(f"{source}: llama.cpp cannot quantise it to {mix}: {''.join(last)[-300:]}")
    return "".join(said)


def _entries(lib: Any, importance: Mapping[str, np.ndarray]) -> Any:
    """The C array of an importance matrix, ended by an entry without a name."""
    entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, weights) in zip(entries, importance.items(), strict=False):
        data = np.ascontiguousarray(weights, dtype=np.float32)
        entry.name = name.encode()
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
        entry._keep = data  # ctypes does not keep it alive
    return entries
