"""What every exporter takes and gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from svdexport.checkpoint import Checkpoint
from svdexport.recipe import CheckpointExport, GgufExport, OnnxExport

ExportSpec = GgufExport | OnnxExport | CheckpointExport


@dataclass(frozen=True)
class ExportRequest:
    """One export: a compressed (or dense) checkpoint to be written in one format.

    Attributes:
        checkpoint: what is exported; without pairs it is the dense twin.
        source: dense Hugging Face folder of the original model (tokenizer, config, weights).
        source_gguf: the user's GGUF where the model came as one; it is then the base.
        out: file or folder to create; the caller renames it into place.
        work: scratch folder shared by all exports of a run.
        spec: the recipe's entry.
        packed: folder of weights that were quantised before, in the types of ``spec``.
        trust_remote_code: whether code in ``source`` may run.
    """

    checkpoint: Checkpoint
    source: Path
    source_gguf: Path | None
    out: Path
    work: Path
    spec: ExportSpec
    packed: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as it was meant to be written: shape and type in the file's own terms."""

    shape: tuple[int, ...]
    type: str
    nbytes: int
    sha256: str

    @classmethod
    def of(cls, shape: tuple[int, ...], type_name: str, data: bytes | memoryview) -> TensorRecord:
        view = memoryview(data)
        return cls(tuple(shape), type_name, view.nbytes, hashlib.sha256(view).hexdigest())


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote; ``notes`` say what was rounded, kept dense or made larger and why."""

    path: Path
    format: str
    type: str
    bytes: int
    tensors: dict[str, TensorRecord] = field(repr=False)
    notes: tuple[str, ...] = ()
