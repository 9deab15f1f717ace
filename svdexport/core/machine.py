"""The machine that figures were taken on, without its name or its user's."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (  # of version 2 and 1: limit, use, statistics and the name in them of the files' cache
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def cpu_name() -> str:
    """The processor as the system calls it, else its architecture."""
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def made_by_intel() -> bool:
    """Whether the processor says that Intel made it."""
    return "GenuineIntel" in (_cpuinfo("vendor_id") or platform.processor())


def _cpuinfo(*keys: str) -> str:
    """The first field of Linux's table of processors with one of these names; else empty."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys and value.strip():
                return value.strip()
    return ""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, str | int | float]:
    """Processor, cores that may be used, memory in bytes, system: what a reader needs to compare
    figures.
    """
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of a container's limit.

    Cached pages of files that nobody has used lately count as free, as the system gives them back.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, cached in _CGROUPS:
        try:
            most = int((_CGROUP / limit).read_text())
            taken = int((_CGROUP / used).read_text())
        except (OSError, ValueError):  # no limit ("max"), or another kind of system
            continue
        free = min(free, most - taken + _statistic(_CGROUP / statistics, cached))
    return max(free, 0)


def _statistic(path: Path, name: str) -> int:
    """A figure of a table of names and numbers; 0 where there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return next((int(row[1]) for row in rows if row[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep up to 256 MB of freed memory instead of handing all of it back.

    glibc returns a freed tensor of some megabytes to the system at once, which zeroes its pages
    again for the next one: a fifth of a calibration's time. Larger tensors go on as before.
    Where the C library has no such setting, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, size in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20)):
            mallopt(parameter, size)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No search for cyclic garbage inside: it disturbs timings, and imports of large libraries."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
