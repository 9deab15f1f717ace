"""Row 25 at the level of the run's folders: kills and full disks at any moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svdexport.errors import RecipeError, ResourceError
from svdexport.files import atomic_file, resource_errors, sha256_file
from svdexport.rundir import MANIFEST, RunDir
from tests.hostile.makers import write_model

STAGES = 6


def toy_run(out: Path, version: str, pause: float = 0.0) -> list[str]:
    """A run of small stages, each of which depends on the one before; gives the stages it made."""
    made = []
    with RunDir(out, recipe_hash=version) as run:
        if run.published:
            return made
        content = version
        for stage in range(STAGES):
            file = run.work / "stages" / f"{stage}.txt"
            key = f"{version}-{stage}"
            if not run.done(str(stage), key):
                file.parent.mkdir(exist_ok=True)
                with file.open("w") as handle:
                    for _ in range(20):
                        handle.write(content)
                        handle.flush()
                        time.sleep(pause)
                run.mark(str(stage), key, [file])
                made.append(str(stage))
            content = sha256_file(file)
        run.staging.mkdir(exist_ok=True)
        with atomic_file(run.staging / "model.gguf") as temporary:
            temporary.write_text(content)
        manifest = {"schema": 1, "recipe_sha256": "0", "files": {"model.gguf": content}}
        with atomic_file(run.staging / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest))
        run.publish()
    return made


def is_complete(out: Path) -> bool:
    """Whether the published folder is whole; fails where a part of one is there."""
    if not out.exists():
        return False
    manifest = json.loads((out / MANIFEST).read_text())
    assert {path.name for path in out.iterdir()} == {MANIFEST, "model.gguf"}
    assert (out / "model.gguf").read_text() == manifest["files"]["model.gguf"]
    return True


def test_row_25_kills_at_forty_moments_leave_nothing_partial(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    toy_run(reference, "one")
    expected = (reference / "model.gguf").read_bytes()
    out = tmp_path / "out"
    kills = 0
    for attempt in range(200):
        child = os.fork()
        if child == 0:
            toy_run(out, "one", pause=0.0005)
            os._exit(0)
        time.sleep(0.001 + 0.0012 * (attempt % 40))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        complete = is_complete(out)
        if complete:
            assert (out / "model.gguf").read_bytes() == expected
        if kills >= 40 and complete:
            break
        if complete:
            # A kill between the rename and the note of it: the resume finds all stages done.
            toy_run(out, "one")
            # Begin anew: a later kill must also spare the earlier output.
            with RunDir(out, recipe_hash="two"):
                assert is_complete(out)
            with RunDir(out, recipe_hash="one", restart=True):
                assert is_complete(out)
    assert kills >= 20
    toy_run(out, "one")
    assert (out / "model.gguf").read_bytes() == expected
    assert list(tmp_path.rglob(".*.part")) == []


def test_row_25_a_resume_repeats_only_what_is_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        toy_run(out, "one", pause=0.01)
        os._exit(0)
    marker = tmp_path / ".out.work" / "stages" / "2.json"
    end = time.monotonic() + 60
    while not marker.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before its third stage"
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(RecipeError, match="--restart"):
        toy_run(out, "edited")
    made = toy_run(out, "one")
    assert 1 <= len(made) <= STAGES - 3
    assert made[-1] == str(STAGES - 1)


def test_row_25_a_flipped_byte_in_an_intermediate_file_is_redone(tmp_path: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    toy_run(reference, "one")
    toy_run(out, "one")
    (out / "model.gguf").unlink()
    (out / MANIFEST).unlink()
    out.rmdir()
    file = tmp_path / ".out.work" / "stages" / "3.txt"
    damaged = bytearray(file.read_bytes())
    damaged[7] ^= 1
    file.write_bytes(damaged)
    assert toy_run(out, "one") == ["3"]
    assert (out / "model.gguf").read_bytes() == (reference / "model.gguf").read_bytes()


LIMITED = """
import resource, sys
from pathlib import Path
from svdexport.errors import ResourceError
from svdexport.files import atomic_file, resource_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with resource_errors("stage factors"), atomic_file(Path(sys.argv[1])) as temporary:
        {write}
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    "write",
    [
        "temporary.write_bytes(bytes(100_000))",
        "import numpy as np; np.save(temporary.open('wb'), np.zeros(100_000))",
        "import numpy, safetensors.numpy as s; s.save_file({'a': numpy.zeros(10**5)}, temporary)",
    ],
    ids=["plain", "numpy", "safetensors"],
)
def test_row_25_a_file_that_cannot_grow_is_exit_6_and_leaves_nothing(
    tmp_path: Path, write: str
) -> None:
    target = tmp_path / "factors.bin"
    command = [sys.executable, "-c", LIMITED.format(write=write), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "disk is full" in done.stdout
    assert "same command again" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_exit_6(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        with pytest.raises(ResourceError, match="out of memory"), resource_errors("stage x"):
            bytearray(2**32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["eval", "bench", "load"])
def test_a_model_that_does_not_fit_is_exit_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import torch

    from svdexport import api
    from svdexport.models import loader
    from svdexport.runtimes import torch_rt

    class Huge:
        @staticmethod
        def from_pretrained(*args: object, **kwargs: object) -> torch.Tensor:
            return torch.empty(2**48)

    for module in (loader, torch_rt):
        monkeypatch.setattr(module, "auto_class", lambda folder: Huge)
    folder, text = write_model(tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("some words")
    with pytest.raises(ResourceError, match="out of memory") as caught:
        if command == "eval":
            api.evaluate(folder, text, threads=1)
        elif command == "bench":
            api.bench([folder], threads=1)
        else:
            with resource_errors("run"):
                loader.load_model(folder)
    assert ("last finished stage" in str(caught.value)) == (command == "load")
