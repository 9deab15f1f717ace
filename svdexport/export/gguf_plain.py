"""The dense model, plainly quantised to about the size of another file: what pairs compete with.

llama.cpp's own quantiser chooses the mix of types and writes the file, with the importance matrix
of the run's calibration: the best that its users get without pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.export import gguf_base
from svdexport.export.base import Exported
from svdexport.export.gguf_importance import read_importance
from svdexport.export.gguf_plan import find_matches
from svdexport.files import atomic_file, write_atomic
from svdexport.runtimes.ggml_quantize import MIXES, quantize_file, quantized_bytes


def export_plain(
    source: Path, source_gguf: Path | None, work: Path, folder: Path, most: int, threads: int
) -> Exported:
    """Write the largest plain file of at most ``most`` bytes, or the smallest where all are larger.

    Args:
        source: dense Hugging Face folder. source_gguf: the user's GGUF, if the model came as one.
        work: scratch folder shared by all exports of the run (base, importance).
        folder: where the file is written, named by its mix.

    Raises:
        InputError: llama.cpp refuses the model.
    """
    base = gguf_base.prepare(source, source_gguf, work)
    matches = find_matches(base, Checkpoint.open(source), work)
    importance = read_importance(work, matches)
    named = {name: importance.of_tensor(name) for name in base.file.tensors}
    weights = {name: found for name, found in named.items() if found is not None}
    header = min(info.offset for info in base.file.tensors.values())
    mix = choose_mix(base.file.path, most - header)
    out = folder / f"model-{mix}.gguf"
    record, mark = out.with_suffix(".json"), _mark(base, weights)
    if not (out.exists() and record.exists() and record.read_text(encoding="utf-8") == mark):
        record.unlink(missing_ok=True)
        with atomic_file(out) as part:
            quantize_file(base.file.path, part, mix, threads, weights)
        write_atomic(record, mark)
    return Exported(out, "gguf", mix, out.stat().st_size, {})


def _mark(base: gguf_base.Base, weights: Mapping[str, np.ndarray]) -> str:
    """Of what a plain file is made from: one that two artifacts share is written once."""
    digest = hashlib.sha256(base.fingerprint.encode())
    for name, found in sorted(weights.items()):
        digest.update(name.encode() + found.tobytes())
    return digest.hexdigest()


def choose_mix(base: Path, most: int) -> str:
    """The mix whose tensors come nearest to ``most`` bytes from below, or else the smallest."""
    sizes = {mix: quantized_bytes(base, mix) for mix in MIXES}
    fitting = [mix for mix, size in sizes.items() if size <= most]
    if fitting:
        return max(fitting, key=lambda mix: sizes[mix])
    return min(sizes, key=lambda mix: sizes[mix])
