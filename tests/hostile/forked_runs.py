"""Runs in processes of their own that can be killed or starved; imports are paid for once."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the server that all runs are forked from.
CONTEXT.set_forkserver_preload(
    [
        "svdexport.cli",
        "svdexport.pipeline.run",
        "svdexport.models.hf",
        "transformers.models.llama.modeling_llama",
        "torch._dynamo",
    ]
)


@dataclass(frozen=True)
class Limits:
    """What a run may use: bytes of one file, and bytes of memory beyond what it starts with.

    ``bound``: permissions of files bind it even where the tests run as root.
    """

    file: int | None = None
    memory: int | None = None
    bound: bool = False


def start(folder: Path, arguments: list[str], limits: Limits | None = None) -> CONTEXT.Process:
    """Begin ``svdexport ARGUMENTS`` in ``folder``; stderr goes to the file ``stderr`` there."""
    process = CONTEXT.Process(target=_child, args=(str(folder), arguments, limits or Limits()))
    process.start()
    return process


def finish(folder: Path, arguments: list[str], limits: Limits | None = None) -> tuple[int, str]:
    """The same to the end: exit code (negative: a signal) and stderr."""
    process = start(folder, arguments, limits)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, (folder / "stderr").read_text()


def _child(folder: str, arguments: list[str], limits: Limits) -> None:
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["svdexport", *arguments]
    import torch

    from svdexport import cli

    sys.addaudithook(_watch)

    torch.set_num_threads(1)
    with (
        Path("stderr").open("w") as err,
        Path(os.devnull).open("w") as out,
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
    ):
        if limits.file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file, limits.file))
        if limits.memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + limits.memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if limits.bound:
            _drop_capabilities()
        cli.main()


def _drop_capabilities() -> None:
    """Root without CAP_DAC_OVERRIDE is bound by permissions as anyone is (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    """Note in the file ``audit`` what a run with local files has no reason to do."""
    if event in {"pickle.find_class", "os.system", "os.exec", "subprocess.Popen"} or (
        event == "socket.connect" and isinstance(arguments[1], tuple)
    ):
        with Path("audit").open("a") as file:
            file.write(f"{event} {arguments!r}\n")
