"""The form that onnxruntime-mobile loads: ORT format, and which operators a small build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from svdexport.errors import InputError

FOLDER = "mobile"
MODEL = "model.ort"
OPERATORS = "required_operators.config"
"""What ``--include_ops_by_config`` of onnxruntime's build takes: types and operators."""


def write_mobile(folder: Path, graph: str, data: str) -> Path:
    """Convert ``folder``'s graph by onnxruntime's own converter; gives the new folder in it.

    The converted model is loaded back and must give what the graph gives, bit for bit. Raises
    InputError where the converter refuses or the results differ (ORT format ends at 2 GB).
    """
    out = folder / FOLDER
    out.mkdir()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ort-") as scratch:
        place = Path(scratch)
        for name in (graph, data):  # the converter takes every graph of a folder
            os.link(folder / name, place / name)
        command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
        command += ["--optimization_style", "Fixed", "--target_platform", "arm"]
        command += ["--enable_type_reduction", "--output_dir", str(place / "ort"), str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = sorted((place / "ort").glob("*.ort"))
        settings = sorted((place / "ort").glob("required_operators*.config"))
        if done.returncode or len(made) != 1 or len(settings) != 1:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{folder / graph}: onnxruntime's converter to .ort failed ({last})")
        shutil.move(made[0], out / MODEL)
        shutil.move(settings[0], out / OPERATORS)
    _check_same(folder / graph, out / MODEL)
    return out


def _check_same(graph: Path, converted: Path) -> None:
    import onnxruntime as ort

    found = []
    for file in (graph, converted):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        feeds = {v.name: _example(v.name, v.type, v.shape) for v in session.get_inputs()}
        found.append(session.run(None, feeds)[0])
        del session
    if not np.array_equal(*found):
        gap = float(np.abs(found[0].astype(np.float64) - found[1]).max())
        raise InputError(f"{converted}: gives other numbers than {graph.name} (by {gap:.3g})")


_TOKENS = 7


def _example(name: str, kind: str, shape: list[int | str]) -> np.ndarray:
    """A short prompt with an empty cache."""
    if name.startswith("past_key_values."):
        dtype = np.float16 if kind == "tensor(float16)" else np.float32
        return np.zeros((1, int(shape[1]), 0, int(shape[3])), dtype)
    if name == "attention_mask":
        return np.ones((1, _TOKENS), np.int64)
    return np.arange(_TOKENS, dtype=np.int64)[None] + (3 if name == "input_ids" else 0)
