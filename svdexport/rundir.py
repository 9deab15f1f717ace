"""The folders of a run: where it works, where its output appears, and what is already done.

A run into ``out/NAME`` works in the hidden ``out/.NAME.work`` beside it (same file system, so the
last step is a rename) and puts what it will publish under ``.NAME.work/out``. Each finished stage
leaves a marker with the hash of its inputs and of its files; a run that was killed finds them and
goes on. Nothing appears under the final name before everything has passed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from svdexport.errors import RecipeError
from svdexport.files import (
    NO_SPACE,
    all_files,
    atomic_file,
    fsync,
    read_json,
    resource_errors,
    sha256_file,
    write_atomic,
)

__all__ = [
    "MANIFEST",
    "RunDir",
    "atomic_file",
    "check_out",
    "is_ours",
    "resource_errors",
    "sha256_file",
    "write_atomic",
]

MANIFEST = "manifest.json"
_TOOL = "svdexport"
_RUN = "run.json"


class RunDir:
    """The output place of one run, its work folder, lock and stage markers.

    Use as a context manager: entering checks the place and takes the lock, leaving releases it.

    Args:
        out: the folder that the finished output will be.
        recipe_hash: of the recipe this run follows. inputs: of all that it reads and of the
            versions; a published output of others is made anew.
        protected: files and folders that are read and must not be overwritten (model, texts).
        restart: drop what an unfinished run with whatever recipe left behind.

    Raises:
        RecipeError: the place cannot be used, another run uses it, or it holds an unfinished run
            of another recipe.
    """

    def __init__(
        self,
        out: Path,
        *,
        recipe_hash: str,
        inputs: str = "",
        protected: Sequence[Path] = (),
        restart: bool = False,
    ) -> None:
        self.out = check_out(out, protected)
        self.work = self.out.parent / f".{self.out.name}.work"
        self._old = self.out.parent / f".{self.out.name}.old"
        self._recipe_hash = recipe_hash
        self._inputs = inputs
        self._restart = restart
        self._lock: int | None = None
        self.published = False  # whether this very recipe was published here before

    @property
    def staging(self) -> Path:
        """Where the output is put together; ``publish`` renames it to ``out``."""
        return self.work / "out"

    def __enter__(self) -> RunDir:
        _check_work(self.work)
        with resource_errors(f"{self.work}"), _output_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.work / "lock", self.out)
        try:
            with resource_errors(f"{self.work}"), _output_errors(self.work):
                self._finish_swap()
                self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def done(self, stage: str, key: str) -> bool:
        """Whether a stage with the same inputs (``key``) finished and its files are intact."""
        record = read_json(self._marker(stage))
        if not isinstance(record, dict) or record.get("key") != key:
            return False
        files = record.get("files")
        return isinstance(files, dict) and all(
            _is_intact(self.work / name, entry) for name, entry in files.items()
        )

    def mark(self, stage: str, key: str, files: Iterable[Path]) -> None:
        """Note that a stage is finished; ``files`` (folders: all in them) reach the disk first."""
        with resource_errors(f"stage {stage}"):
            records = {}
            for path in all_files(files):
                fsync(path)
                records[path.relative_to(self.work).as_posix()] = {
                    "bytes": path.stat().st_size,
                    "sha256": sha256_file(path),
                }
            record = {"stage": stage, "key": key, "files": records}
            write_atomic(self._marker(stage), _dumps(record))

    def forget(self, stage: str) -> None:
        """Take back that a stage is finished."""
        self._marker(stage).unlink(missing_ok=True)

    def publish(self) -> Path:
        """Rename the staged output to its final name; an earlier output of ours gives way.

        Raises:
            RecipeError: something else has appeared at the final name meanwhile.
        """
        if not is_ours(self.staging):
            raise RuntimeError(
                f"{self.staging} has no {MANIFEST} of ours: not ready to be published"
            )
        with resource_errors(f"{self.out}"), _output_errors(self.out):
            check_out(self.out, ())
            for path in all_files([self.staging]):
                fsync(path)
            if self.out.exists():
                self.out.rename(self._old)
            self.staging.rename(self.out)
            fsync(self.out.parent)
            shutil.rmtree(self._old, ignore_errors=True)
            self._write_run(complete=True)
        return self.out

    def discard(self) -> None:
        """Remove the work folder (the lock is held until the end)."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _begin(self) -> None:
        """Go on with the work folder's run, or clear it for a new one."""
        record = read_json(self.work / _RUN)
        begun = record if isinstance(record, dict) else {}
        same = begun.get("recipe") == self._recipe_hash
        if begun and not same and not begun.get("complete") and not self._restart:
            raise RecipeError(
                f"{self.work}: an unfinished run of a different recipe; put the recipe back to "
                f"resume it, or remove that folder to start anew (`run` does so with --restart)"
            )
        if self._restart or not same:
            for path in self.work.iterdir():
                if path.name == "lock":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        for part in self.work.rglob(".*.part"):  # of writes that were killed
            part.unlink(missing_ok=True)
        same = same and begun.get("inputs") == self._inputs
        self.published = same and begun.get("complete") is True and is_ours(self.out)
        if self._restart or not self.published:
            self._write_run(complete=False)

    def _finish_swap(self) -> None:
        """Undo a swap of outputs that was killed between its two renames."""
        if self._old.is_dir() and not self._old.is_symlink() and is_ours(self._old):
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)

    def _write_run(self, complete: bool) -> None:
        record = {"tool": _TOOL, "recipe": self._recipe_hash, "inputs": self._inputs}
        write_atomic(self.work / _RUN, _dumps(record | {"complete": complete}))

    def _marker(self, stage: str) -> Path:
        return self.work / "stages" / f"{stage}.json"

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_out(out: Path, protected: Sequence[Path] = ()) -> Path:
    """The absolute path of an output folder that may be created or replaced.

    Args:
        out: the folder; absent, empty, or an earlier output with only files of its manifest.
        protected: files and folders that must not be overwritten.

    Raises:
        RecipeError: the place is a symlink, a file, holds something else, or is protected.
    """
    out = Path(out).absolute()
    try:
        if out.is_symlink():
            raise RecipeError(f"{out}: the output is a symbolic link; give a real folder")
        place = out.resolve()
        if not place.name or place == Path.home() or place == Path.cwd():
            raise RecipeError(f"{out}: cannot be an output; give the name of a new folder")
        for item in protected:
            _check_apart(place, Path(item).resolve())
        if place.exists() and not place.is_dir():
            raise RecipeError(f"{out}: the output is an existing file; give the name of a folder")
        if place.exists() and any(place.iterdir()):
            _check_replaceable(place)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{out}: cannot be used as the output ({error})") from None
    return place


def is_ours(folder: Path) -> bool:
    """Whether a folder is a published output: it has a manifest of this tool."""
    return _manifest_files(folder) is not None


def _check_apart(place: Path, item: Path) -> None:
    if place == item:
        raise RecipeError(f"{place}: the output is the input itself; give another folder")
    if item.is_dir() and item in place.parents:
        raise RecipeError(f"{place}: the output lies inside the input {item}; give another folder")
    if place in item.parents:
        raise RecipeError(
            f"{place}: the output would replace the input {item}; give another folder"
        )


def _check_replaceable(place: Path) -> None:
    """Only a folder of which every file is in our manifest may give way."""
    known = _manifest_files(place)
    if known is None:
        raise RecipeError(
            f"{place}: not empty and not an earlier output of svdexport; give another folder"
        )
    for path in all_files([place]):
        name = path.relative_to(place).as_posix()
        if name not in known:
            raise RecipeError(
                f"{place}: {name} is not part of the earlier output there; move it away or give "
                f"another folder"
            )


def _manifest_files(folder: Path) -> set[str] | None:
    """The files that the manifest of an output of ours accounts for; None where it is not ours."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"schema", "recipe_sha256"} <= manifest.keys():
        return None
    files = manifest.get("files")
    return {MANIFEST, *files} if isinstance(files, dict) else None


def _check_work(work: Path) -> None:
    """The work folder must be absent, empty, or one that a run of ours began."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise RecipeError(f"{work}: not a folder; remove it, the run works there")
    if not work.exists():
        return
    # A run that was killed at its very beginning leaves the lock and a part of its first record.
    names = {path.name for path in work.iterdir() if not path.name.startswith(f".{_RUN}.")}
    if not names <= {"lock"}:
        record = read_json(work / _RUN)
        if not isinstance(record, dict) or record.get("tool") != _TOOL:
            raise RecipeError(f"{work}: not a work folder of svdexport; move it away")


def _take_lock(path: Path, out: Path) -> int:
    """An exclusive lock that ends with the process; its file names the process."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise RecipeError(
                f"{out}: another run (process {holder}) is writing there; wait for it or give "
                f"another output"
            ) from None
        # The file may have been removed with the work folder between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.truncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        os.close(handle)
        path.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _output_errors(place: Path) -> Iterator[None]:
    """A place that cannot be written is a wrong output place, not a bug."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise RecipeError(f"{place}: cannot be written ({error.strerror})") from error


def _is_intact(path: Path, entry: Any) -> bool:
    try:
        return (
            not path.is_symlink()
            and path.stat().st_size == entry["bytes"]
            and sha256_file(path) == entry["sha256"]
        )
    except (OSError, KeyError, TypeError):
        return False


def _dumps(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, sort_keys=True) + "\n"
