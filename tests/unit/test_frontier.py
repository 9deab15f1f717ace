"""Files of several sizes, measured beside llama.cpp's plain types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from svdexport import api
from svdexport.core.measures import Speedup
from svdexport.errors import RecipeError
from svdexport.pipeline import frontier
from svdexport.pipeline.reporter import Reporter
from svdexport.report.frontier import Point, page, pictures, sentence
from tests.hostile.makers import write_model
from tests.unit.gguf_models import make_model
from tests.unit.test_byte_budget import RECIPE


def point(name: str, size: int, kld: float, plain: bool) -> Point:
    speed = None if name == "Q4_0" else Speedup(1.1, 1.0, 1.2)
    return Point(name, f"model-{name}.gguf", size, plain, 20.0, kld, speed, speed)


POINTS = [
    point("Q8_0", 140, 0.01, True),
    point("100MB", 100, 0.02, False),
    point("Q4_0", 90, 0.2, True),
    point("80MB", 80, 0.3, False),
    point("Q2_K", 75, 0.25, True),
]


def test_the_sentence_compares_with_files_that_are_no_larger() -> None:
    said = sentence(POINTS)
    better, worse = said.split("model than")
    assert "100MB" in better
    assert "80MB" not in better
    assert "80MB" in worse


def test_a_file_smaller_than_all_plain_ones_is_compared_with_the_larger() -> None:
    said = sentence([*POINTS, point("70MB", 70, 0.22, False), point("60MB", 60, 0.9, False)])
    last = said.partition("All plain files are larger than these: ")[2]
    assert last == "70MB is nearer than Q2_K; 60MB is nearer than none of them."
    assert "70MB" not in said.removesuffix(last)


def test_table_and_pictures_show_every_file() -> None:
    text = page(POINTS)
    assert all(f"{p.name} |" in text for p in POINTS)
    assert "1.10x (1.00 to 1.20)" in text
    drawn = pictures(POINTS)
    assert set(drawn) == {"quality-bytes.svg", "quality-prefill.svg", "quality-decode.svg"}
    for name, svg in drawn.items():
        labels = [e.text for e in ElementTree.fromstring(svg).iter() if e.text]
        shown = [p.name for p in POINTS if name == "quality-bytes.svg" or p.name != "Q4_0"]
        assert set(shown) <= set(labels)


def test_speeds_without_their_baseline_are_refused_before_any_work(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("BYTES", "400000"))
    with pytest.raises(RecipeError, match="--plain Q4_0, or give --no-speed"):
        api.frontier(recipe, [400_000], tmp_path / "frontier", plain=["Q8_0"])
    assert not list((tmp_path / ".frontier.work").glob("stages/*"))


@pytest.mark.slow
def test_budgets_and_plain_types_are_written_and_measured(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("BYTES", "400000"))
    out = tmp_path / "frontier"
    found = api.frontier(
        recipe,
        [290_000, 400_000],
        out,
        plain=["Q8_0", "Q4_0"],
        speed=False,
        reporter=Reporter(quiet=True),
    )
    assert found == out
    points = json.loads((out / "frontier.json").read_text())
    assert {p["name"] for p in points} == {"0.29MB", "0.4MB", "Q8_0", "Q4_0"}
    assert [p["bytes"] for p in points] == sorted((p["bytes"] for p in points), reverse=True)
    for p in points:
        assert (out / "files" / p["file"]).stat().st_size == p["bytes"]
        if not p["plain"]:
            assert p["bytes"] <= float(p["name"].removesuffix("MB")) * 1e6
    by_name = {p["name"]: p for p in points}
    assert by_name["0.4MB"]["mean_kld"] < by_name["0.29MB"]["mean_kld"]
    assert (out / "frontier.md").is_file()
    left = {path.name for path in (tmp_path / ".frontier.work").iterdir()}
    assert not left & {"factors", "checkpoint", "quantized", "base", "reference"}
    with pytest.raises(RecipeError, match="exists already"):
        api.frontier(recipe, [400_000], out)


@pytest.mark.slow
def test_an_interrupted_frontier_of_a_changed_model_makes_its_files_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "frontier"
    recipe.write_text(RECIPE.replace("BYTES", "400000"))
    quiet = Reporter(quiet=True)

    def run() -> None:
        api.frontier(recipe, [400_000], out, plain=["Q8_0"], speed=False, reporter=quiet)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    files = {}
    for spread in (0.02, 0.2):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": spread}
        make_model(tmp_path / "model", "Llama", **sizes)
        with monkeypatch.context() as patch:
            patch.setattr(frontier, "_quality", stopped)
            with pytest.raises(KeyboardInterrupt):
                run()
        made = sorted((tmp_path / ".frontier.work").rglob("files/*.gguf"))
        files[spread] = [file.read_bytes() for file in made]
        assert len(made) == 2
    run()
    kept = [path.read_bytes() for path in sorted((out / "files").glob("*.gguf"))]
    assert kept == files[0.2]
    assert not set(kept) & set(files[0.02])
