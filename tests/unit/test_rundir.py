"""The run's folders: output place, lock, stage markers, publishing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svdexport.errors import RecipeError, ResourceError
from svdexport.pipeline.run import clean
from svdexport.rundir import (
    MANIFEST,
    RunDir,
    atomic_file,
    check_out,
    is_ours,
    resource_errors,
    write_atomic,
)


def stage_output(run: RunDir, text: str) -> None:
    run.staging.mkdir(parents=True, exist_ok=True)
    (run.staging / "model.gguf").write_text(text)
    manifest = {"schema": 1, "recipe_sha256": "0", "files": {"model.gguf": "x"}}
    (run.staging / MANIFEST).write_text(json.dumps(manifest))


def test_a_run_publishes_only_at_the_end_and_replaces_its_own_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("first", "second"):
        with RunDir(out, recipe_hash=text) as run:
            stage_output(run, text)
            if text == "first":
                assert not out.exists()
            else:
                assert (out / "model.gguf").read_text() == "first"
            assert run.publish() == out
        assert (out / "model.gguf").read_text() == text
    assert is_ours(out)
    assert not (tmp_path / ".out.old").exists()
    with RunDir(out, recipe_hash="second") as run:
        assert run.published
    with RunDir(out, recipe_hash="third") as run:
        assert not run.published


def test_an_output_of_other_inputs_is_made_anew(tmp_path: Path) -> None:
    for inputs in ("first", "second"):
        with RunDir(tmp_path / "out", recipe_hash="r", inputs=inputs) as run:
            assert not run.published
            stage_output(run, inputs)
            run.publish()
        with RunDir(tmp_path / "out", recipe_hash="r", inputs=inputs) as run:
            assert run.published


def test_publishing_without_a_manifest_is_a_bug(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out", recipe_hash="r") as run:
        run.staging.mkdir()
        with pytest.raises(RuntimeError, match="not ready"):
            run.publish()
    assert not (tmp_path / "out").exists()


def test_markers_hold_for_the_same_inputs_and_intact_files(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out", recipe_hash="r") as run:
        folder = run.work / "factors"
        folder.mkdir()
        (folder / "0.bin").write_bytes(b"abc")
        assert not run.done("factorize", "k1")
        run.mark("factorize", "k1", [folder])
    with RunDir(tmp_path / "out", recipe_hash="r") as run:
        assert run.done("factorize", "k1")
        assert not run.done("factorize", "k2")
        assert not run.done("calibrate", "k1")
        (folder / "0.bin").write_bytes(b"abd")
        assert not run.done("factorize", "k1")
        (folder / "0.bin").unlink()
        assert not run.done("factorize", "k1")


def test_another_recipe_needs_a_restart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunDir(out, recipe_hash="r1") as run:
        (run.work / "stats").write_text("old")
        run.mark("calibrate", "k", [run.work / "stats"])
    with pytest.raises(RecipeError, match="--restart"), RunDir(out, recipe_hash="r2"):
        pass
    # commands without that option, too, must say what their user can do
    with pytest.raises(RecipeError, match="remove that folder"), RunDir(out, recipe_hash="r2"):
        pass
    with RunDir(out, recipe_hash="r1") as run:
        assert run.done("calibrate", "k")
    with RunDir(out, recipe_hash="r2", restart=True) as run:
        assert not run.done("calibrate", "k")
        assert not (run.work / "stats").exists()


def test_a_second_run_into_the_same_folder_stops_and_names_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        RunDir(out, recipe_hash="r"),
        pytest.raises(RecipeError, match=f"process {os.getpid()}"),
        RunDir(out, recipe_hash="r"),
    ):
        pass
    with RunDir(out, recipe_hash="r") as run:
        assert run.work.is_dir()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from svdexport.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1]), recipe_hash='r'):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with (
            pytest.raises(RecipeError, match=f"process {child.pid}"),
            RunDir(tmp_path / "out", recipe_hash="r"),
        ):
            pass
        child.send_signal(signal.SIGKILL)
    with RunDir(tmp_path / "out", recipe_hash="r") as run:
        assert run.work.is_dir()


def test_a_swap_that_was_killed_halfway_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunDir(out, recipe_hash="r") as run:
        stage_output(run, "old")
        run.publish()
    out.rename(tmp_path / ".out.old")
    with RunDir(out, recipe_hash="r"):
        assert (out / "model.gguf").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("same", "the output is the input itself"),
        ("inside", "the output lies inside the input"),
        ("around", "the output would replace the input"),
        ("file", "the output is an existing file"),
        ("link", "the output is a symbolic link"),
        ("foreign", "not empty and not an earlier output of svdexport"),
        ("extra", "thesis.txt is not part of the earlier output there"),
    ],
)
def test_an_output_place_that_holds_something_else_is_refused(
    tmp_path: Path, place: str, words: str
) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    out = {"same": model, "inside": model / "out", "around": model.parent}.get(
        place, tmp_path / "out"
    )
    if place == "file":
        out.write_text("notes")
    elif place == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    elif place == "foreign":
        out.mkdir()
        (out / "thesis.txt").write_text("years")
    elif place == "extra":
        with RunDir(out, recipe_hash="r") as run:
            stage_output(run, "old")
            run.publish()
        (out / "thesis.txt").write_text("years")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError) as caught:
        check_out(out, [model])
    assert str(caught.value).startswith(f"{out}: {words}")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_work_folder_is_refused(tmp_path: Path) -> None:
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "mine").write_text("x")
    with (
        pytest.raises(RecipeError, match="not a work folder"),
        RunDir(tmp_path / "out", recipe_hash="r"),
    ):
        pass
    assert (work / "mine").read_text() == "x"


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out", recipe_hash="r") as run:
        run.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("new, but half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        OSError("100000 requested and 496 written"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("Error: I/O error: No space left on device (os error 28)"),
    ],
)
def test_exhaustion_says_what_ran_out_and_what_to_do(error: Exception) -> None:
    expected = r"stats: .*(disk is full|out of memory).* again"
    with pytest.raises(ResourceError, match=expected), resource_errors("stats"):
        raise error


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ValueError, match="odd"), resource_errors("stats"):
        raise ValueError("odd")


def test_a_finished_runs_work_folder_keeps_its_records_alone(tmp_path: Path) -> None:
    """Factors, checkpoints, and the float32 copy of a model that came as GGUF are gigabytes."""
    for name in ("factors", "checkpoint", "base", "dense", "source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_text("x")
    (tmp_path / "run.json").write_text("{}")
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
