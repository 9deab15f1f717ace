"""Norms in a GGUF: where they stand, and gains that the run has trained.

Their tensors are found by gguf-py's names and shown by content: the base must hold the model's own
values there. A converter that changes them (Gemma's, which adds one) leaves none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.export.gguf_layout import floats
from svdexport.packed import GGUF_PART, PackedFolder
from svdexport.runtimes.gguf_file import GgufFile

TRAINED = "gain"  # kind of trained gains, float32, in a folder of packed weights


def norm_places(base: GgufFile, gains: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Tensor of the base for each norm ``<path>.weight`` whose gains (n,) stand there."""
    names = _names(base)
    found = {}
    for name, values in gains.items():
        stem = None if names is None else names.get_name(name.removesuffix(".weight"))
        tensor = f"{stem}.weight"
        if tensor in base.tensors and np.array_equal(base.rows(tensor).reshape(-1), values):
            found[name] = tensor
    return found


def _names(base: GgufFile) -> Any:
    import gguf

    known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    if base.architecture not in known:
        return None
    blocks = int(base.value(f"{base.architecture}.block_count", 0))
    return gguf.get_tensor_name_map(known[base.architecture], blocks)


def gains_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The norms of a checkpoint, float32: vectors by the names that norms have."""
    named = [name for name in checkpoint.names() if re.search(r"(norm|\.ln_\w+)\.weight$", name)]
    vectors = {name: floats(checkpoint, name) for name in named}
    return {name: values for name, values in vectors.items() if values.ndim == 1}


def trained_gains(
    packed: PackedFolder, base: GgufFile, checkpoint: Checkpoint
) -> dict[str, Callable[[], np.ndarray]]:
    """File tensor -> its row of trained gains, of those that a folder holds."""
    trained = [name for name, kind in packed.kinds.items() if kind == TRAINED]
    if not trained:
        return {}
    places = norm_places(base, gains_of(checkpoint))

    def row(name: str) -> Callable[[], np.ndarray]:
        return lambda: packed.read(name).parts[GGUF_PART].reshape(1, -1)

    return {places[name]: row(name) for name in trained}
