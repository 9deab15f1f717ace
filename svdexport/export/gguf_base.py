"""The GGUF that an export starts from: llama.cpp's own converter's output, or the user's GGUF."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError, MissingExtraError
from svdexport.files import atomic_file, check_exhausted
from svdexport.runtimes.gguf_file import GgufFile

CONVERTER_VARIABLE = "SVDEXPORT_GGUF_CONVERTER"
CONVERTER = "converter/convert_hf_to_gguf.py"
OUTTYPES = {"F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Base:
    """An opened base file.

    Attributes:
        file: the GGUF.
        given: True where it is the user's own file; the Hugging Face folder was then made from it.
        fingerprint: of what it was made from, to know a cached file from a stale one.
    """

    file: GgufFile
    given: bool
    fingerprint: str


def prepare(source: Path, source_gguf: Path | None, work: Path) -> Base:
    """The base for a model, made on the first call of a run and reused after.

    Args:
        source: dense Hugging Face folder.
        source_gguf: the user's GGUF, if the model came as one.
        work: scratch folder of the run.

    Raises:
        InputError: the converter refuses the model, or the GGUF is one part of several.
        MissingExtraError: no converter is installed.
    """
    if source_gguf is not None:
        file = GgufFile(source_gguf)
        if file.value("split.count", 1) not in (0, 1):
            raise InputError(f"{source_gguf}: one part of several; join them with llama-gguf-split")
        return Base(file, True, fingerprint([source_gguf]))
    checkpoint = Checkpoint.open(source)
    mark = fingerprint(sorted(path for path in source.iterdir() if path.is_file()))  # all are read
    outtype = exact_outtype(checkpoint)
    path = work / f"base-{outtype}-{mark}.gguf"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        for old in work.glob("base-*.gguf"):
            old.unlink()
        convert(source, path, outtype)
    return Base(GgufFile(path), False, mark)


def exact_outtype(checkpoint: Checkpoint) -> str:
    """The converter's ``--outtype`` that holds all matrices exactly: their dtype, or f32."""
    from safetensors import safe_open

    dtypes = set()
    for shard in set(checkpoint.files.values()):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not iterable)
                piece = file.get_slice(name)
                if len(piece.get_shape()) > 1:
                    dtypes.add(piece.get_dtype())
    return OUTTYPES.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def convert(source: Path, out: Path, outtype: str, through: Path | None = None) -> None:
    """Run llama.cpp's converter; its output appears under ``out`` whole or not at all.

    It writes to a name of its own: where a run was killed, its converter may still be writing.

    Args:
        through: a program that is started in its place, with the converter's path first.
    """
    programs = [str(converter())] if through is None else [str(through), str(converter())]
    with atomic_file(out) as part:
        command = [sys.executable, *programs, str(source.resolve()), "--outtype", outtype]
        done = subprocess.run(
            [*command, "--outfile", str(part)],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        if done.returncode:
            check_exhausted(done.stderr, str(out), killed=done.returncode < 0)
        if done.returncode or not part.stat().st_size:
            raise InputError(
                f"{source}: llama.cpp's converter refuses this model: {last_words(done.stderr)}"
            )


def converter() -> Path:
    """``convert_hf_to_gguf.py`` as installed beside the llama.cpp runtime, or the user's own."""
    if path := os.environ.get(CONVERTER_VARIABLE):
        if not Path(path).is_file():
            raise InputError(
                f"{CONVERTER_VARIABLE}: {path} is not a file; set it to the path of llama.cpp's "
                "convert_hf_to_gguf.py, or unset it"
            )
        return Path(path)
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtraError("gguf", "writing a GGUF file") from None
    path_found = Path(llama_cpp.__file__).parent / CONVERTER
    if not path_found.exists():
        raise InputError(
            f"{path_found}: missing; the installed llama-cpp-python is a stock build without the "
            "converter: build svdexport's runtime (make setup), or set "
            f"{CONVERTER_VARIABLE} to llama.cpp's convert_hf_to_gguf.py"
        )
    return path_found


def last_words(log: str) -> str:
    """The last line of a log that says something, without the logger's prefix."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if line and not re.fullmatch(r"[*\-=\s]*|.*[█%|].*it/s.*", line)]
    errors = [line for line in said if re.match(r"(ERROR|[A-Za-z_.]*(Error|Exception))\b", line)]
    last = (errors or said or ["no message"])[-1]
    return re.sub(r"^(INFO|WARNING|ERROR):[\w.\-]+:", "", last).strip()[:300]


def fingerprint(files: list[Path]) -> str:
    """A short mark of files by name, size and time of change."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
