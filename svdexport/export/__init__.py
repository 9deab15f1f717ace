"""Exporters: a format is one module here and one line in EXPORTERS."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.errors import MissingExtraError
from svdexport.export.base import Exported, ExportRequest, TensorRecord

__all__ = ["EXPORTERS", "ExportRequest", "Exported", "Exporter", "TensorRecord", "exporter"]

EXPORTERS = {"gguf": "gguf", "onnx": "onnx", "checkpoint": "checkpoint"}  # format -> module here
_EXTRAS = {"gguf": "gguf", "onnx": "onnx"}


class Exporter(Protocol):
    """What a format's module offers."""

    def export(self, request: ExportRequest) -> Exported:
        """Write the artifact at ``request.out``."""
        ...

    def read_back(
        self, path: Path, checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Dequantised float32 tensors of the written artifact, under the checkpoint's names."""
        ...

    def check_round_trip(self, path: Path, tensors: dict[str, TensorRecord]) -> list[str]:
        """Differences between the written artifact and what was meant; empty is good."""
        ...


def exporter(format_name: str) -> Exporter:
    """The exporter of a format. Raises MissingExtraError where its libraries are absent."""
    try:
        module = importlib.import_module(f"svdexport.export.{EXPORTERS[format_name]}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("svdexport"):
            raise
        raise MissingExtraError(_EXTRAS[format_name], f"exporting {format_name}") from None
    return cast(Exporter, module)
