"""Faults while GGUF and ONNX files are written and checked, and files that cannot be read."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path

import pytest

from svdexport.errors import ResourceError
from svdexport.files import check_exhausted
from tests.hostile.forked_runs import Limits, finish, start
from tests.unit.gguf_models import make_model

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

RECIPE = """\
schema: 1
model: {path: m}
calibration: {samples: 6, length: 64}
compress: {budget: {param_ratio: 0.7}, rank_multiple: 32}
export: [{format: gguf, type: Q8_0}, {format: onnx, precision: int8}]
evaluate: {context: 128, windows: 2}
speed: {threads: 1}
"""
EXPORT = ["export", "r.yaml", "--out", "o", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    make_model(folder / "m", "Llama", hidden_size=128, intermediate_size=192)
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def clear(place: Path) -> None:
    shutil.rmtree(place / ".o.work", ignore_errors=True)


def digests(place: Path) -> dict[str, str]:
    """Hashes of the exported files and of their dense twins."""
    work = place / ".o.work"
    return {
        path.relative_to(work).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for root in ("out", "dense")
        for path in sorted((work / root).rglob("*"))
        if path.is_file()
    }


def stages(place: Path) -> int:
    return len(list((place / ".o.work" / "stages").glob("*.json")))


@pytest.fixture(scope="module")
def reference(place: Path) -> dict[str, str]:
    """Hashes of an undisturbed export."""
    clear(place)
    code, err = finish(place, EXPORT)
    assert code == 0, err
    found = digests(place)
    assert "out/model-Q8_0.gguf" in found
    assert "dense/onnx-int8/model.onnx" in found
    assert (
        stages(place) == 3 + 2 * 4
    )  # text, factors, checkpoint; two files twice, written, checked
    return found


@pytest.mark.slow
def test_row_25_kills_in_every_export_stage_and_the_resume_gives_the_same_bytes(
    place: Path, reference: dict[str, str]
) -> None:
    """A kill at some moment of each stage; the next run goes on from there."""
    clear(place)
    moments = random.Random(1)
    finished = 0
    for _ in range(40):
        process = start(place, EXPORT)
        while stages(place) == finished and process.is_alive():
            time.sleep(0.002)
        process.join(moments.uniform(0.0, 0.5))
        process.kill()
        process.join()
        assert not (place / "o").exists()
        if process.exitcode == 0:
            break
        finished = stages(place)
    assert finish(place, EXPORT)[0] == 0
    assert digests(place) == reference
    assert not list((place / ".o.work").rglob("*.part"))


@pytest.mark.slow
def test_row_25_a_full_disk_while_exporting_is_exit_6_and_the_resume_gives_the_same_bytes(
    place: Path, reference: dict[str, str]
) -> None:
    stopped = []
    for pattern in ("export model-Q8_0.gguf", "export dense model-Q8_0.gguf", "export onnx-int8"):
        for marker in (place / ".o.work" / "stages").glob(f"{pattern}.json"):
            marker.unlink()
        code, err = finish(place, EXPORT, Limits(file=30_000))
        assert code == 6, err
        assert len(err.splitlines()) == 1
        assert "disk is full" in err
        stopped.append(stages(place))
    assert not (place / "o").exists()
    assert len(stopped) == 3
    code, err = finish(place, EXPORT)
    assert code == 0, err
    assert digests(place) == reference


def test_row_25_a_full_disk_while_the_base_is_converted_is_exit_6(place: Path) -> None:
    for marker in (place / ".o.work" / "stages").glob("export model-Q8_0.gguf.json"):
        marker.unlink()
    for base in (place / ".o.work" / "base").glob("base-*.gguf"):
        base.unlink()
    code, err = finish(place, EXPORT, Limits(file=30_000))
    assert code == 6, err
    assert len(err.splitlines()) == 1
    assert "disk is full" in err
    code, err = finish(place, EXPORT)
    assert code == 0, err


def test_a_converter_or_quantiser_that_ran_out_says_so() -> None:
    check_exhausted("ValueError: unknown architecture", "f")
    with pytest.raises(ResourceError, match="f: the disk is full"):
        check_exhausted("gguf: 65536 requested and 22912 written", "f")
    for said, killed in (("std::bad_alloc", False), ("", True)):
        with pytest.raises(ResourceError, match="f: out of memory"):
            check_exhausted(said, "f", killed)


@pytest.mark.slow
def test_row_25_no_memory_while_exporting_leaves_nothing_partial(
    place: Path, reference: dict[str, str]
) -> None:
    for pattern in ("export model-Q8_0.gguf", "export onnx-int8"):
        (place / ".o.work" / "stages" / f"{pattern}.json").unlink()
        code, err = finish(place, EXPORT, Limits(memory=2 * 2**20))
        # A native library may end the process where it cannot allocate; Python's own code says so.
        assert code == 6 or code < 0, (code, err)
        if code == 6:
            assert "out of memory" in err
        assert not (place / "o").exists()
        code, err = finish(place, EXPORT)
        assert code == 0, err
        assert digests(place) == reference


def test_a_weight_file_that_cannot_be_read_is_exit_3(place: Path) -> None:
    weights = place / "m" / "model.safetensors"
    weights.chmod(0)
    try:
        code, err = finish(place, [*EXPORT[:2], "--out", "p", "--quiet"], Limits(bound=True))
    finally:
        weights.chmod(0o644)
    assert (code, len(err.splitlines())) == (3, 1), err
    assert "model.safetensors" in err
    assert not (place / "p").exists() and not (place / ".p.work").exists()


@pytest.mark.parametrize("name", ["text.txt", "r2.yaml"])
def test_a_text_or_recipe_that_cannot_be_read_is_exit_2(place: Path, name: str) -> None:
    (place / "text.txt").write_text("some words " * 200)
    more = "calibration: {source: file, file: text.txt, samples: 6, length: 64}"
    (place / "r2.yaml").write_text(RECIPE.replace(RECIPE.splitlines()[2], more))
    (place / name).chmod(0)
    try:
        code, err = finish(place, ["export", "r2.yaml", "--out", "p"], Limits(bound=True))
    finally:
        (place / name).chmod(0o644)
    assert code == 2, err
    assert name in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (place / ".p.work").exists()


@pytest.mark.slow
def test_an_intermediate_file_that_cannot_be_read_is_made_again(
    place: Path, reference: dict[str, str]
) -> None:
    (place / ".o.work" / "plan.json").chmod(0)
    code, err = finish(place, EXPORT, Limits(bound=True))
    assert code == 0, err
    assert digests(place) == reference
