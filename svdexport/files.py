"""Files that are written whole or not at all, and exhaustion told from bugs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from svdexport.errors import ResourceError, SvdexportError

MAX_JSON = 64 * 2**20
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Native libraries report exhaustion as text in exceptions of their own.
# NumPy's tofile states only how much it wrote; torch.save passes on that of its stream.
_NO_SPACE_TEXT = (
    *("no space left", "disk quota exceeded", "file too large"),
    *("requested and", "iostream error", "unexpected pos"),
)
_NO_MEMORY_TEXT = ("not enough memory", "cannot allocate memory", "bad_alloc", "out of memory")
_GOES_ON = ": it goes on from the last finished stage"


def stamp(path: Path | None) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of all in a folder: cheap, and a change is noticed."""
    if path is None:
        return []
    files = sorted(p for p in (path, *path.rglob("*")) if p.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that its name holds the old or the new content, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextlib.contextmanager
def resource_errors(what: str, *, resumes: bool = True) -> Iterator[None]:
    """Turn a full disk or exhausted memory into a ResourceError that says where it happened.

    ``resumes``: whether the same command goes on from its last finished stage.
    """
    try:
        yield
    except SvdexportError:
        raise
    except Exception as error:
        text = str(error).lower()
        code = error.errno if isinstance(error, OSError) else None
        if code in NO_SPACE or any(part in text for part in _NO_SPACE_TEXT):
            place = getattr(error, "filename", None) or what
            raise ResourceError(_no_space(place, resumes)) from error
        if is_out_of_memory(error):
            raise ResourceError(_no_memory(what, resumes)) from error
        raise


def check_exhausted(said: str, what: str, killed: bool = False) -> None:
    """Raise ResourceError where another program's words say that disk or memory ran out.

    Args:
        said: its output. what: the file that it wrote.
        killed: it ended by a signal, which is how the kernel takes memory back.
    """
    text = said.lower()
    if any(part in text for part in _NO_SPACE_TEXT):
        raise ResourceError(_no_space(what, True))
    if killed or any(part in text for part in _NO_MEMORY_TEXT):
        raise ResourceError(_no_memory(what, True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, perhaps a native library's own, says that memory ran out."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = str(error).lower()
    return any(part in text for part in _NO_MEMORY_TEXT)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _no_space(place: str, resumes: bool) -> str:
    again = "free some space and run the same command again"
    return f"{place}: the disk is full; {again}{_GOES_ON if resumes else ''}"


def _no_memory(what: str, resumes: bool) -> str:
    lower = "lower calibration.batch or calibration.length, or " if resumes else ""
    again = f"{lower}close other programs, and run the same command again"
    return f"{what}: out of memory; {again}{_GOES_ON if resumes else ''}"


def all_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files of folders and their subfolders, and the files given, in order."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from all_files(sorted(path.iterdir()))
        else:
            yield path


def fsync(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The content of a small JSON file, or None where it is absent or broken."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
