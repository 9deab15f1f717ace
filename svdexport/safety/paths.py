"""Paths that come out of files: contained in their folder, ordinary files, no way out by links."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from svdexport.errors import InputError
from svdexport.safety.documents import quoted


def check_name(name: str, where: str) -> None:
    """A relative path that stays below its folder, on any system. Raises InputError."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name
        or "\0" in name
        or posix.is_absolute()
        or windows.is_absolute()
        or windows.drive
        or windows.root
        or ".." in posix.parts
        or ".." in windows.parts
        or posix == PurePosixPath(".")
    ):
        raise InputError(f"{where}: the path {quoted(name)} is empty or leaves the folder")


def model_file(folder: Path, name: str, where: str) -> Path:
    """The file ``name`` of a model folder, whose links may only lead into it or the hub's blobs.

    Args:
        folder: the model folder, resolved.
        name: relative path, as some file of the folder states it.
        where: the stating file, for the error.

    Raises:
        InputError: the name leaves the folder, a link does, or it is no ordinary file.
    """
    check_name(name, where)
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{where}: the file {quoted(name)} is missing from {folder}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: the file {quoted(name)} cannot be read ({error})") from None
    if not any(root == real or root in real.parents for root in _roots(folder)):
        raise InputError(f"{path}: a link that leaves the model folder, to {quoted(real)}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not an ordinary file")
    return path


def data_file(folder: Path, name: str, where: str) -> Path:
    """A file with external data: below ``folder``, reached and held by no link of any kind.

    A symbolic or hard link would let a model read, or its rewriting change, a file elsewhere.

    Raises:
        InputError: naming ``where`` and the offending path.
    """
    check_name(name, where)
    if "\\" in name:
        raise InputError(f"{where}: the path {quoted(name)} has a backslash")
    path = folder
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                raise InputError(f"{where}: external data {quoted(name)} goes through a link")
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "odd"
        raise InputError(f"{where}: external data {quoted(name)}: {reason.lower()}") from None
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{where}: external data {quoted(name)} is not an ordinary file")
    if info.st_nlink > 1:
        raise InputError(f"{where}: external data {quoted(name)} is a hard link; copy the file")
    return path


def check_regular(path: Path) -> int:
    """Bytes of an ordinary, readable file (a pipe or device would block or never end).

    Raises:
        InputError: it is absent, unreadable or something else.
    """
    try:
        info = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path}: not an ordinary file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read (permission denied)")
    return info.st_size


def _roots(folder: Path) -> list[Path]:
    """Where links of a model folder may lead: itself and, in a hub cache, the repository's blobs.

    The hub's cache keeps ``models--OWNER--NAME/snapshots/REVISION/FILE`` as links to
    ``models--OWNER--NAME/blobs/HASH``.
    """
    roots = [folder]
    for parent in folder.parents:
        if parent.name == "snapshots":
            roots.append(parent.parent / "blobs")
            break
    return roots
