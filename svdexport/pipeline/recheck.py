"""`verify`: is a published folder still what its manifest says?

Every file is hashed; every artifact is then read with the independent reader of its format
(gguf-py, onnx, safetensors) and each tensor's shape, type and bytes are compared with the hashes
that were taken when it was written. A hash of the whole file says that something changed; the
tensors say what.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdexport.errors import ArtifactError, MissingExtraError, SvdexportError
from svdexport.export import TensorRecord, exporter
from svdexport.files import all_files, sha256_file
from svdexport.report import manifest
from svdexport.report.result import ArtifactResult, RunResult
from svdexport.safety import check_gguf, check_onnx, check_safetensors
from svdexport.safety.paths import check_name

MOST_PROBLEMS = 5  # named in the message; the rest is counted


def recheck(folder: Path) -> RunResult:
    """Check a folder that `run` published; returns its result.

    Raises:
        InputError: there is no manifest, or it cannot be read.
        ArtifactError: files or tensors differ from it; the line names them.
        MissingExtraError: the files are as they were, but a reader of their tensors is missing.
    """
    result, files = manifest.read(folder)
    changed = dict(_changed_files(folder, files))
    problems = list(changed.values())
    for artifact in result.artifacts:
        if artifact.kept:
            problems += _tensor_problems(folder, artifact, changed)
    if problems:
        more = len(problems) - MOST_PROBLEMS
        tail = f"; and {more} more" if more > 0 else ""
        raise ArtifactError(f"{folder}: {'; '.join(problems[:MOST_PROBLEMS])}{tail}")
    return result


def _changed_files(folder: Path, files: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Name and problem of each file that is missing, changed, or not in the manifest."""
    for name, entry in files.items():
        check_name(name, str(folder / manifest.NAME))
        path = folder / name
        if path.is_symlink() or not path.is_file():
            yield name, f"{name}: missing, or not an ordinary file"
        elif path.stat().st_size != entry["bytes"]:
            yield name, f"{name}: {path.stat().st_size} bytes, {entry['bytes']} in the manifest"
        elif sha256_file(path) != entry["sha256"]:
            yield name, f"{name}: its sha256 differs from the manifest"
    for path in all_files([folder]):
        name = path.relative_to(folder).as_posix()
        if name not in files and name != manifest.NAME and not manifest.hidden(Path(name)):
            yield name, f"{name}: not in the manifest"


def _tensor_problems(
    folder: Path, artifact: ArtifactResult, changed: dict[str, str]
) -> Iterator[str]:
    """What differs inside of an artifact."""
    check_name(artifact.path, str(folder / manifest.NAME))
    path = folder / artifact.path
    touched = any(name == artifact.path or name in artifact.files for name in changed)
    if not path.exists():
        if not touched:
            yield f"{artifact.path}: missing"
        return
    records = {
        name: TensorRecord(tensor.shape, tensor.type, tensor.nbytes, tensor.sha256)
        for name, tensor in artifact.tensors.items()
    }
    try:
        _check_headers(path)
        found = exporter(artifact.format).check_round_trip(path, records)
    except MissingExtraError:
        if not touched:
            raise
        return
    except SvdexportError as error:
        yield str(error)
        return
    except Exception as error:
        # a damaged file may break its reader in any way, and that it is damaged is known already
        if not touched:
            raise
        yield f"{artifact.path}: cannot be read ({type(error).__name__}: {error})"
        return
    yield from (f"{artifact.path}: {problem}" for problem in found)


def _check_headers(path: Path) -> None:
    """The checks of a foreign file: this one may have been changed by anyone."""
    if path.is_file():
        if path.suffix == ".gguf":
            check_gguf(path)
        return
    for file in sorted(path.glob("*.safetensors")):
        check_safetensors(file)
    if any(path.glob("*.onnx")):
        check_onnx(path)
