"""`manifest.json`: what a published folder holds, how it was made, and how to repeat each figure.

It is the run's result (`result.to_dict`) with two more keys: `files`, the size and sha256 of
every file of the folder but itself and hidden ones, and `figures`, each with the command that
repeats it. Write it last.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdexport.core.measures import Embeddings, Quality
from svdexport.errors import InputError
from svdexport.files import all_files, sha256_file, write_atomic
from svdexport.report import result as results
from svdexport.report.result import ArtifactResult, RunResult

NAME = "manifest.json"
SCHEMA_FILE = f"manifest-{results.SCHEMA_VERSION}.schema.json"  # its version is the manifest's
MAX_BYTES = 1 << 28  # a manifest of a large model has some 10,000 tensors: a few megabytes

_QUALITY_FIGURES = ("perplexity", "perplexity_ratio", "mean_kld", "kld_p999", "same_top")
_EMBEDDING_FIGURES = ("mean_cosine", "low_cosine", "rank_correlation")


def write(result: RunResult, folder: Path) -> Path:
    """Write the manifest of a folder whose other files are all there. Raises ValueError where a
    figure is not finite."""
    data = results.to_dict(result)
    data["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in all_files([folder])
        if path != folder / NAME and not hidden(path.relative_to(folder))
    }
    data["figures"] = list(figures(result))
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(folder / NAME, text)
    return folder / NAME


def hidden(name: Path) -> bool:
    """Whether a file belongs to whoever holds the folder, such as ``.git/config``."""
    return any(part.startswith(".") for part in name.parts)


def read(folder: Path) -> tuple[RunResult, dict[str, dict[str, Any]]]:
    """The result and the `files` of a folder's manifest. Raises InputError where it has none, or
    one that this version cannot read."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{folder}: no {NAME}: not a folder that `svdexport run` wrote")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: larger than any manifest ({path.stat().st_size} bytes)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        result = results.from_dict(data)
        files = data["files"]
        for name, entry in files.items():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"files.{name}: needs bytes and sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest that can be read ({error})") from None
    return result, files


def figures(result: RunResult) -> Iterator[dict[str, Any]]:
    """Every announced figure with its interval and the command that repeats it."""
    for artifact in result.artifacts:
        yield {
            "artifact": artifact.path,
            "figure": "bytes",
            "value": artifact.bytes,
            "command": shlex.join(["svdexport", "inspect", artifact.path])
            if artifact.kept
            else result.command,
        }
        if artifact.quality is not None:
            yield from _again(result, artifact, artifact.quality, _QUALITY_FIGURES)
        if artifact.embeddings is not None:
            yield from _again(result, artifact, artifact.embeddings, _EMBEDDING_FIGURES)
        if artifact.speed is not None:
            yield from _speed(result, artifact)


def json_schema() -> dict[str, Any]:
    """JSON schema of the manifest."""
    schema = results.json_schema()
    entry = {
        "type": "object",
        "required": ["bytes", "sha256"],
        "properties": {"bytes": {"type": "integer"}, "sha256": {"type": "string"}},
    }
    figure = {
        "type": "object",
        "required": ["artifact", "figure", "value", "command"],
        "properties": {
            "artifact": {"type": "string"},
            "figure": {"type": "string"},
            "value": {"type": "number"},
            "low": {"type": "number"},
            "high": {"type": "number"},
            "command": {"type": "string"},
        },
    }
    schema["properties"]["files"] = {"type": "object", "additionalProperties": entry}
    schema["properties"]["figures"] = {"type": "array", "items": figure}
    schema["required"] = [*schema["required"], "files", "figures"]
    schema["title"] = f"svdexport manifest, version {results.SCHEMA_VERSION}"
    return schema


def shipped_schema() -> dict[str, Any]:
    """The schema file that the package carries; equal to ``json_schema()``."""
    text = (Path(__file__).parent / SCHEMA_FILE).read_text(encoding="utf-8")
    data = json.loads(text)
    assert isinstance(data, dict)
    return data


def _again(
    result: RunResult,
    artifact: ArtifactResult,
    found: Quality | Embeddings,
    names: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    """The figures that there are, with the interval of those that have one."""
    command = _verify_command(result, artifact, "--quality")
    for name in names:
        value = getattr(found, name)
        if value is None:
            continue
        entry = {"artifact": artifact.path, "figure": name, "value": value, "command": command}
        spread = found.spreads.get(name)
        if spread is not None:
            entry |= {"low": spread.low, "high": spread.high}
        yield entry


def _verify_command(result: RunResult, artifact: ArtifactResult, option: str) -> str:
    """In the published folder; the model is where the reader has it, under the name it had.

    The run's own command for what is not in the folder.
    """
    if not artifact.kept:
        return result.command
    parts = ["svdexport", "verify", ".", option, "--model", result.source.name]
    if result.recipe.get("model", {}).get("trust_remote_code"):
        parts.append("--trust-remote-code")
    return shlex.join(parts)


def _speed(result: RunResult, artifact: ArtifactResult) -> Iterator[dict[str, Any]]:
    assert artifact.speed is not None
    command = _verify_command(result, artifact, "--speed")
    for timing in artifact.speed.timings:
        head = {"artifact": artifact.path, "command": command}
        yield head | {"figure": f"{timing.metric}_tps", "value": timing.tps}
        if timing.speedup is not None:
            yield head | {
                "figure": f"{timing.metric}_speedup",
                "value": timing.speedup.median,
                "low": timing.speedup.low,
                "high": timing.speedup.high,
            }
