"""`RunResult`: everything a run found out, in one frozen dataclass from which every report is
made.

The pipeline fills it once, at the end; `manifest.json`, the model card, the HTML and Markdown
reports and the table in the terminal read it and nothing else. It survives a trip through JSON
unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from svdexport.core.measures import ArtifactSpeed, Embeddings, GateResult, Parity, Quality, Verdict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlanRow:
    """What became of one linear layer.

    `rank` is None where it stayed dense, and then `reason` says why. `layer` is the index of its
    decoder block (None outside of them), `shape` is (n_out, n_in), `params` counts the parameters
    it has now (a shared A is counted with its leader). `predicted_error` is the allocator's
    predicted loss, `relative_error` the relative error of the layer's output on the calibration
    text, ||W X - B A X|| / ||W X||.
    """

    name: str
    shape: tuple[int, int]
    params_dense: int
    params: int
    rank: int | None = None
    layer: int | None = None
    group: str | None = None
    reason: str = ""
    predicted_error: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class TensorHash:
    """A tensor as the file holds it: type by the format's own name, sha256 of its bytes."""

    shape: tuple[int, ...]
    type: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactResult:
    """One written artifact and what was measured on it.

    `path` is relative to the output folder, with forward slashes. `role`: "compressed" is what
    the run is about; "dense" is its twin of the same format and type, the baseline; "plain" is a
    plainly quantised file of like size. `files` maps each file (relative to the output folder) to
    its sha256, `tensors` each tensor of the file. `round_trip` lists problems: empty is good.
    `kept` is false for an artifact that was only measured and is not in the output folder (a
    baseline).
    """

    path: str
    format: str
    type: str
    role: Literal["compressed", "dense", "plain"]
    runtime: str
    bytes: int
    quality: Quality | None = None
    speed: ArtifactSpeed | None = None
    parity: Parity | None = None
    round_trip: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorHash] = field(default_factory=dict)
    kept: bool = True
    embeddings: Embeddings | None = None

    @property
    def label(self) -> str:
        """Format and type, of an ONNX folder with what else its name says of it."""
        name = file_name(self.path)
        own = name.startswith(f"onnx-{self.type}") and self.format == "onnx"
        return f"onnx {name.removeprefix('onnx-')}" if own else f"{self.format} {self.type}".strip()


@dataclass(frozen=True)
class Comparison:
    """A compressed artifact beside the plainly quantised file of like size (paths of both).

    `plain_is` says how the plain file's quality compares: better, worse, or undecided where the
    difference is within two standard errors over windows of text. Speedups are over the dense
    twin of the compressed artifact, None where they were not measured.
    """

    artifact: str
    plain: str
    plain_is: Literal["better", "worse", "undecided"]
    bytes: int
    plain_bytes: int
    perplexity: float
    plain_perplexity: float
    decode_speedup: float | None = None
    plain_decode_speedup: float | None = None


@dataclass(frozen=True)
class StageTime:
    """Wall-clock seconds of a stage; `resumed` where the stage was taken from an earlier,
    interrupted run.
    """

    name: str
    seconds: float
    resumed: bool = False


@dataclass(frozen=True)
class SourceModel:
    """Where the weights come from. `files` maps file names to sha256. `license` is an SPDX name,
    or "" where unknown.
    """

    name: str
    architecture: str
    params: int
    license: str = ""
    base_model: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """See the module. `created` is UTC in ISO 8601; `recipe` is the recipe as used, with all
    defaults; `recipe_text` the file as the user wrote it; `overrides` the `--set key=value`
    arguments; `command` the whole command line."""

    name: str
    created: str
    command: str
    recipe: dict[str, Any]
    recipe_text: str
    recipe_sha256: str
    source: SourceModel
    plan: tuple[PlanRow, ...]
    artifacts: tuple[ArtifactResult, ...]
    gates: tuple[GateResult, ...]
    verdict: Verdict
    stages: tuple[StageTime, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str | int | float] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    evaluation_text: str = ""
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    equal_bytes: tuple[Comparison, ...] = ()
    schema: int = SCHEMA_VERSION

    def baseline_of(self, artifact: ArtifactResult) -> ArtifactResult | None:
        """The dense twin, of the same name; else one of the same format, type and runtime.

        None for a dense artifact or where there is none.
        """
        if artifact.role == "dense":
            return None
        dense = [other for other in self.artifacts if other.role == "dense"]
        twin = next((other for other in dense if other.path == f"dense/{artifact.path}"), None)
        if twin is not None:
            return twin
        for other in dense:
            same = (other.format, other.type, other.runtime) == (
                artifact.format,
                artifact.type,
                artifact.runtime,
            )
            if same:
                return other
        return None


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[RunResult]:
    return TypeAdapter(RunResult)


def to_dict(result: RunResult) -> dict[str, Any]:
    """The result as JSON-ready dictionaries and lists."""
    data = _adapter().dump_python(result, mode="json")
    assert isinstance(data, dict)
    return data


def to_json(result: RunResult) -> str:
    """Deterministic JSON. Raises ValueError where a figure is not finite: such a figure must not
    be announced.
    """
    return json.dumps(to_dict(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(data: Any) -> RunResult:
    """The inverse of `to_dict`. Raises ValueError with the first offending key."""
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema {version!r} is not {SCHEMA_VERSION}, the only one this version reads"
        )
    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from error


def from_json(text: str) -> RunResult:
    """The inverse of `to_json`. Raises ValueError."""
    return from_dict(json.loads(text))


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of the dictionary of `to_dict`."""
    schema = _adapter().json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"svdexport run result, version {SCHEMA_VERSION}"
    return schema


def file_name(path: str) -> str:
    """Last part of a path, for tables."""
    return PurePath(path).name
