"""Coverage-guided fuzzing of the checks that stand before every library, with atheris.

    pip install atheris
    python tools/fuzz/run.py gguf --seconds 600

A check may refuse (InputError, RecipeError) or accept; any other exception, over 2 seconds of CPU
or over 1 GB for one input is a crash, written as ``crash-NAME-*`` to the current folder. What
reached new code is kept in ``tests/hostile/corpus/NAME.zip``, which the tests replay.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "hostile" / "corpus"
NAMES = {
    "gguf": "m.gguf",
    "onnx": "m.onnx",
    "safetensors": "m.safetensors",
    "recipe": "r.yaml",
    "folder": "config.json",
}
MAX_INPUT = 4096
SECONDS = 2
MEGABYTES = 1024


def target(name: str) -> Callable[[bytes], None]:
    """A function that gives bytes to one check and lets only surprises through."""
    from svdexport.errors import InputError, RecipeError
    from svdexport.recipe import load_recipe
    from svdexport.safety import check_gguf, check_model_folder, check_onnx, check_safetensors
    from tests.hostile.makers import write_model

    # Memory, where the system has it: a disk that is busy would look like a slow check.
    memory = Path("/dev/shm")
    scratch = Path(
        tempfile.mkdtemp(prefix="svdexport-fuzz-", dir=memory if memory.is_dir() else None)
    )
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if name == "folder":
        write_model(scratch)
    (scratch / "w.data").write_bytes(bytes(16))
    path = scratch / NAMES[name]
    checks = {
        "gguf": check_gguf,
        "onnx": check_onnx,
        "safetensors": check_safetensors,
        "recipe": load_recipe,
        "folder": lambda file: check_model_folder(file.parent),
    }
    check = checks[name]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        begin = time.process_time()
        try:
            check(path)
        except (InputError, RecipeError) as error:
            for line in str(error).splitlines():
                if not line.isprintable():
                    raise AssertionError(f"unprintable refusal: {line!r}") from error
        if time.process_time() - begin > SECONDS:
            raise AssertionError(f"over {SECONDS} s of CPU")

    return run


def seeds(name: str) -> list[bytes]:
    """Sound inputs to start from."""
    from tests.hostile import makers
    from tests.unit.test_recipe import TEXT

    external = {"location": "w.data", "offset": "0", "length": "16"}
    tensor = makers.onnx_external(external)
    header, data = makers.safetensors_parts(makers.llama_tensors())
    small = dict(list(header.items())[:2])
    return {
        "gguf": [
            makers.gguf_bytes(),
            makers.gguf_bytes([makers.gguf_u32("general.alignment", 64)], [], data=0),
        ],
        "onnx": [makers.onnx_model(tensor, place) for place in makers.ONNX_PLACES],
        "safetensors": [makers.safetensors_bytes(small, data[: 12 * 8 * 4 + 8 * 4])],
        "recipe": [TEXT.encode()],
        "folder": [json.dumps(makers.CONFIG).encode()],
    }[name]


def unpack(name: str, folder: Path) -> None:
    """The kept corpus and the seeds as files."""
    inputs = seeds(name)
    if (CORPUS / f"{name}.zip").exists():
        with zipfile.ZipFile(CORPUS / f"{name}.zip") as archive:
            inputs += [archive.read(entry) for entry in archive.namelist()]
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def keep(name: str, folder: Path) -> None:
    """Pack the files of a corpus, with fixed times so that equal corpora are equal files."""
    CORPUS.mkdir(exist_ok=True)
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs in a process of its own, as libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["svdexport", "json", "yaml"]):
        run = target(name)
    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.worker:
        fuzz(options.name, options.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch)
        unpack(options.name, corpus)
        limits = [
            f"-max_total_time={options.seconds}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-max_len={MAX_INPUT}",
            "-timeout=300",
            "-verbosity=0",
            "-print_final_stats=1",
            f"-artifact_prefix=crash-{options.name}-",
        ]
        command = [sys.executable, __file__, options.name, "--worker", *limits, scratch]
        status = subprocess.run(command, check=False).returncode
        keep(options.name, corpus)
        print(f"{options.name}: {len(list(corpus.iterdir()))} inputs kept, exit {status}")
    sys.exit(status)


if __name__ == "__main__":
    main()
