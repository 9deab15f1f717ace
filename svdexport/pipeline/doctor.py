"""``doctor``: what is installed here, and how to get what is not."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

from svdexport.pipeline.inputs import versions
from svdexport.pipeline.job import default_threads

# module -> (pip extra, what it is for)
PARTS = {
    "onnx": ("onnx", "ONNX export"),
    "onnxruntime": ("onnx", "running ONNX"),
    "onnxruntime_genai": ("onnx", "building and running ONNX"),
    "gguf": ("gguf", "GGUF export"),
    "llama_cpp": ("gguf", "running GGUF"),
    "matplotlib": ("report", "pictures in the report"),
    "jinja2": ("report", "the report"),
    "datasets": ("datasets", "calibration from a data set"),
}
GET_PAIRS = (
    "build one that does: python tools/llama_cpp/build.py in svdexport's sources prints a wheel; "
    "pip install it"
)


def examine() -> dict[str, Any]:
    """Versions, optional parts with how to get them, and what the installed llama.cpp can do."""
    parts = []
    for module, (extra, purpose) in PARTS.items():
        there = importlib.util.find_spec(module) is not None
        advice = "" if there else f"pip install 'svdexport[{extra}]'"
        parts.append({"part": module, "for": purpose, "installed": there, "advice": advice})
    return {
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": default_threads()},
        "parts": parts,
        "llama_cpp": _llama_cpp(),
    }


def _llama_cpp() -> dict[str, Any]:
    """Whether the installed llama.cpp knows low-rank pairs, and carries its converter."""
    if importlib.util.find_spec("llama_cpp") is None:
        advice = f"no llama.cpp; {GET_PAIRS}"
        return {"installed": False, "low_rank": False, "converter": False, "advice": advice}
    from svdexport.errors import SvdexportError
    from svdexport.export.gguf_base import converter
    from svdexport.runtimes.ggml import supports_low_rank

    knows = supports_low_rank()
    try:
        has_converter = converter().is_file()
    except SvdexportError:
        has_converter = False
    if knows and has_converter:
        advice = ""
    elif knows:
        advice = f"it lacks llama.cpp's converter, which GGUF export needs; {GET_PAIRS}"
    else:
        advice = f"this llama.cpp is a stock one and refuses files with pairs; {GET_PAIRS}"
    return {"installed": True, "low_rank": knows, "converter": has_converter, "advice": advice}
