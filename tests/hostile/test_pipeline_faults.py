"""Row 25 on the whole pipeline: kills, a full disk, no memory, an edited recipe, a second run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from svdexport.safety import check_file_finite, check_safetensors
from tests.hostile.forked_runs import Limits, finish, start
from tests.unit.tiny_checkpoints import make_model

RECIPE = """\
schema: 1
model: {path: m}
calibration: {samples: 6, length: 32}
compress: {budget: {param_ratio: 0.7}, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""
RUN = ["run", "r.yaml", "--out", "o", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "m", "llama-tied")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def _fresh(place: Path) -> None:
    clear(place)
    (place / "r.yaml").write_text(RECIPE)


def clear(place: Path) -> None:
    shutil.rmtree(place / "o", ignore_errors=True)
    shutil.rmtree(place / ".o.work", ignore_errors=True)


def digests(place: Path) -> dict[str, str]:
    """Hashes of the published artifacts; reports hold times and differ."""
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((place / "o").rglob("*"))
        if path.is_file() and path.parent != place / "o"
    }


@pytest.fixture(scope="module")
def reference(place: Path) -> tuple[dict[str, str], float]:
    """Hashes of an undisturbed run's artifacts, and its seconds."""
    clear(place)
    finish(place, RUN)
    clear(place)
    begin = time.perf_counter()
    code, err = finish(place, RUN)
    seconds = time.perf_counter() - begin
    assert code == 0, err
    found = digests(place)
    assert len(found) >= 3
    return found, seconds


@pytest.mark.slow
def test_row_25_twenty_kills_leave_nothing_partial_and_the_resume_gives_the_same_bytes(
    place: Path, reference: tuple[dict[str, str], float]
) -> None:
    expected, seconds = reference
    moments = random.Random(0)
    kills = 0
    for _ in range(100):
        process = start(place, RUN)
        process.join(moments.uniform(0.0, seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and not (place / "o").exists():
            kills += 1
            if kills == 20:
                break
            continue
        # It had published: then everything is there, and another begins.
        assert digests(place) == expected
        clear(place)
    assert kills == 20
    assert finish(place, RUN)[0] == 0
    assert digests(place) == expected


@pytest.mark.slow
def test_row_25_a_disk_that_fills_up_is_exit_6_and_the_resume_gives_the_same_bytes(
    place: Path, reference: tuple[dict[str, str], float]
) -> None:
    """Each limit lets the run come further than the one before: text, factors, checkpoint."""
    stopped = set()
    for size in (1_000, 20_000, 200_000):
        code, err = finish(place, RUN, Limits(file=size))
        assert code == 6, err
        assert len(err.splitlines()) == 1
        assert "disk is full" in err
        assert not (place / "o").exists()
        stopped.add(len(list((place / ".o.work").glob("stages/*.json"))))
    assert len(stopped) >= 3
    assert finish(place, RUN)[0] == 0
    assert digests(place) == reference[0]


@pytest.mark.slow
def test_memory_that_runs_out_leaves_nothing_partial(
    place: Path, reference: tuple[dict[str, str], float]
) -> None:
    codes = []
    for megabytes in (1, 16, 64):
        code, err = finish(place, RUN, Limits(memory=megabytes * 2**20))
        codes.append(code)
        # A native library may end the process where it cannot allocate; Python's own code says so.
        assert code == 6 or code < 0 or (code == 0 and megabytes > 1), err
        assert (place / "o").exists() == (code == 0)
        if code == 6:
            assert "out of memory" in err
        elif code == 0:
            break
    assert codes[0] != 0
    assert finish(place, RUN)[0] == 0
    assert digests(place) == reference[0]


def test_row_25_a_recipe_edited_before_the_resume_is_exit_2(place: Path) -> None:
    process = start(place, RUN)
    while not (place / ".o.work" / "stages" / "text.json").exists():
        time.sleep(0.01)
        assert process.is_alive()
    process.kill()
    process.join()
    (place / "r.yaml").write_text(RECIPE.replace("0.7", "0.6"))
    code, err = finish(place, RUN)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--restart" in err
    assert not (place / "o").exists()
    assert finish(place, [*RUN, "--restart"])[0] == 0


def test_two_runs_into_the_same_folder(place: Path) -> None:
    first = start(place, RUN)
    lock = place / ".o.work" / "lock"
    while not lock.exists() or not lock.read_text():
        time.sleep(0.005)
        assert first.is_alive()
    os.kill(first.pid or 0, signal.SIGSTOP)
    code, err = finish(place, RUN)
    assert code == 2
    assert f"process {first.pid}" in err
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join(120)
    assert first.exitcode == 0
    assert digests(place)


def test_row_25_one_flipped_byte_in_an_output(place: Path) -> None:
    assert finish(place, RUN)[0] == 0
    assert finish(place, ["verify", "o"])[0] == 0
    weights = next((place / "o").rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    code, err = finish(place, ["verify", "o"])
    assert (code, len(err.splitlines())) == (3, 1)
    assert weights.name in err


def test_row_22_a_chat_template_is_copied_and_never_rendered(place: Path) -> None:
    marker = place / "ran"
    payload = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = place / "m" / "chat_template.jinja"
    template.write_text(payload)
    try:
        assert finish(place, RUN)[0] == 0
    finally:
        template.unlink()
    copies = list((place / "o").rglob("chat_template.jinja"))
    assert copies
    assert all(copy.read_text() == payload for copy in copies)
    assert not marker.exists()


def test_row_15_a_text_shorter_than_one_sequence_is_exit_2(place: Path) -> None:
    (place / "short.txt").write_text("too short")
    more = ["--set", "calibration.source=file", "--set", "calibration.file=short.txt"]
    code, err = finish(place, [*RUN, *more])
    assert (code, len(err.splitlines())) == (2, 1)
    assert "short.txt" in err
    assert "shorter than one sequence" in err
    assert not (place / "o").exists()


def test_row_10_a_hub_cache_of_links_with_tied_embeddings(
    place: Path, reference: tuple[dict[str, str], float]
) -> None:
    repository = place / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(place / "m", snapshot)
    (repository / "blobs").mkdir()
    for path in sorted(snapshot.iterdir()):
        path.rename(repository / "blobs" / f"hash-{path.name}")
        path.symlink_to(f"../../blobs/hash-{path.name}")
    code, err = finish(place, [*RUN, "--set", "model.path=models--a--b/snapshots/0123"])
    assert code == 0, err
    assert digests(place) == reference[0]
    (weights,) = (place / "o" / "checkpoint").rglob("*.safetensors")
    assert not weights.is_symlink()
    names = check_safetensors(weights).tensors
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_row_16_fewer_tokens_than_the_width(place: Path) -> None:
    few = ["--set", "calibration.samples=1", "--set", "calibration.length=16"]
    code, err = finish(place, [*RUN, *few])
    assert code == 0, err
    (weights,) = (place / "o" / "checkpoint").rglob("*.safetensors")
    check_file_finite(check_safetensors(weights))
    manifest = json.loads((place / "o" / "manifest.json").read_text())
    assert any("moments of their inputs are singular" in note for note in manifest["notes"])
    assert any(note.startswith("weights loaded for the compression") for note in manifest["notes"])


def test_nothing_is_unpickled_run_or_fetched(
    place: Path, reference: tuple[dict[str, str], float]
) -> None:
    """Audit events of the interpreter, over all runs of this module so far and one more."""
    assert finish(place, [*RUN, "--offline"])[0] == 0
    assert digests(place) == reference[0]
    assert not (place / "audit").exists(), (place / "audit").read_text()
