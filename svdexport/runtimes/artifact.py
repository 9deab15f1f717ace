"""What an artifact is: a GGUF file, an ONNX folder or a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from svdexport.errors import InputError
from svdexport.rundir import MANIFEST
from svdexport.runtimes.gguf_file import adapter_of

Kind = Literal["gguf", "onnx", "checkpoint"]


def kind(path: Path) -> Kind:
    """Tell the kind of artifact at ``path`` from its first bytes or its files.

    Raises InputError where it is none of the three.
    """
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return "gguf"
        if path.suffix == ".onnx":
            return "onnx"
        raise InputError(f"{path}: neither a GGUF nor an ONNX file")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if any(path.glob("*.onnx")):
        return "onnx"
    if (path / "config.json").exists():
        return "checkpoint"
    if (path / MANIFEST).is_file():
        raise InputError(
            f"{path}: a run's output; name one file or folder in it, as its README does"
        )
    raise InputError(f"{path}: holds no *.onnx and no config.json: not an artifact svdexport knows")


def size_bytes(path: Path) -> int:
    """Bytes of weights and graph: the file, or a folder's model files (tokenizers left out).

    A GGUF file's adapter, where it says that it has one, is counted with it.
    """
    if path.is_file():
        beside = adapter_of(path) if path.suffix == ".gguf" else None
        return path.stat().st_size + (beside.stat().st_size if beside is not None else 0)
    suffixes = (".onnx", ".data", ".safetensors")
    return sum(f.stat().st_size for f in path.iterdir() if f.name.endswith(suffixes))
