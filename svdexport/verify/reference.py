"""Logits of a reference, computed once and read by window for every candidate."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svdexport.errors import ArtifactError, ResourceError
from svdexport.runtimes.base import Runtime

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]


class LogitSource(Protocol):
    """Where reference logits come from."""

    @property
    def count(self) -> int:
        """Number of windows."""
        ...

    def window(self, index: int) -> Logits:
        """Float32 logits (T-1, vocab) of positions 0..T-2 of a window."""
        ...


class ReferenceLogits:
    """A float32 file (windows, T-1, vocab) in a work folder, mapped into memory.

    The file's name holds a hash of the tokens and of what computed the logits, so that a second
    run finds it, and another text or another file does not.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self._data = np.memmap(path, dtype=np.float32, mode="r", shape=shape)

    @property
    def count(self) -> int:
        return int(self._data.shape[0])

    def window(self, index: int) -> Logits:
        rows: Logits = self._data[index]
        return rows

    @classmethod
    def of(cls, runtime: Runtime, tokens: Tokens, folder: Path) -> ReferenceLogits:
        """Logits of `runtime` on windows (W, T), from `folder` where they are there already.

        Raises ResourceError where the disk cannot hold them; ArtifactError for wrong shapes.
        """
        shape = (tokens.shape[0], tokens.shape[1] - 1, runtime.vocab_size)
        need = int(np.prod(shape, dtype=np.int64)) * 4
        path = folder / f"logits-{_key(runtime, tokens)}.f32"
        if path.exists() and path.stat().st_size == need:
            return cls(path, shape)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise ResourceError(
                f"{folder}: the reference's logits need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free: evaluate fewer windows or a smaller context"
            )
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            for index, window in enumerate(tokens):
                logits = np.asarray(runtime.logits(window), dtype=np.float32)
                if logits.shape != (window.size, runtime.vocab_size):
                    raise ArtifactError(
                        f"{runtime.path}: logits of shape {logits.shape} for window {index} of "
                        f"{window.size} tokens and {runtime.vocab_size} words"
                    )
                file.write(np.ascontiguousarray(logits[:-1]).data)
        part.replace(path)
        return cls(path, shape)


def _key(runtime: Runtime, tokens: Tokens) -> str:
    """Hash of the tokens and of the artifact: its files' names, sizes and times of change."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").data)
    path = runtime.path.resolve()
    digest.update(f"{tokens.shape}|{runtime.name}|{runtime.vocab_size}|{path}".encode())
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        status = file.stat()
        digest.update(f"|{file.name}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]
