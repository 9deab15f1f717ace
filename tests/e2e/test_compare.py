"""The comparison of methods, and the papers' recipes, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.errors import RecipeError
from svdexport.pipeline.compare import CONTENDERS
from svdexport.recipe import load_recipe
from svdexport.report.comparison import Comparison, Entry, Figure, picture, table
from tests.e2e.test_methods import checked, written_recipe

PAPERS = sorted((Path(__file__).parents[2] / "recipes" / "papers").glob("*.yaml"))
# the sizes, cut: what a paper's recipe needs besides a model and a text
CUT = ("calibration.samples=6", "calibration.length=48", "calibration.batch=4",
       "evaluate.context=48", "evaluate.windows=2", "compress.rank_multiple=4",
       "compress.budget.param_ratio=0.6")  # fmt: skip
MORE = {
    "asvd": ("compress.allocation.samples=1", "compress.allocation.length=16"),
    "dobi_svd": ("compress.allocation.iterations=2", "compress.allocation.length=48"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_recipe(tmp_path_factory.mktemp("compare"))


def test_compare_gives_the_perplexity_of_the_compressed_checkpoints(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ("svd_llm, grouped", "svd_llm_v2", "asvd, sensitivity")
    out = recipe.parent / "compared"
    command = [sys.executable, "-m", "svdexport", "compare", str(recipe), "--out", str(out)]
    command += ["--ratio", "0.8", "--ratio", "0.6", "--json", "--quiet"]
    for label in labels:
        command += ["--method", label]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "compare.json").read_text())
    assert [entry["label"] for entry in printed["entries"]] == [labels[2], *labels[:2]]
    figure = printed["entries"][1]["figures"][1]
    assert figure["ratio"] == 0.6
    assert figure["kept"] == pytest.approx(0.6, abs=0.06)
    checkpoint = api.compress(recipe, recipe.parent / "one", ["compress.allocate=uniform"])
    text = recipe.parent / "text.txt"
    for artifact, expected in (
        (checkpoint, figure["perplexity"]),
        (recipe.parent / "model", printed["dense"]),
    ):
        found = api.evaluate(artifact, text, context=48, windows=2)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        "compare.md",
        "compare.svg",
    ]


def test_compare_in_sequence_gives_the_perplexity_of_that_checkpoint(recipe: Path) -> None:
    labels = ("kfac_svd, both labels", "kfac_svd, in sequence")
    out = recipe.parent / "sequence"
    api.compare(recipe, out, ["compress.method=kfac_svd"], ratios=[0.6], labels=labels)
    apart, sequence = json.loads((out / "compare.json").read_text())["entries"]
    assert apart["settings"] == sequence["settings"] == {"labels": "both"}
    assert (apart["sequential"], sequence["sequential"]) == (False, True)
    how = ["compress.method=kfac_svd", "compress.settings.labels=both", "compress.group=false"]
    how += ["compress.allocate=greedy", "compress.budget.param_ratio=0.6"]
    for entry in (apart, sequence):
        more = f"compress.sequential={str(entry['sequential']).lower()}"
        checkpoint = api.compress(
            recipe, recipe.parent / f"seq-{entry['sequential']}", [*how, more]
        )
        found = api.evaluate(checkpoint, recipe.parent / "text.txt", context=48, windows=2)
        assert found["perplexity"] == pytest.approx(entry["figures"][0]["perplexity"], rel=1e-4)
    assert apart["figures"][0]["perplexity"] != sequence["figures"][0]["perplexity"]
    assert apart["figures"][0]["kept"] == sequence["figures"][0]["kept"]


def test_a_recipes_own_settings_change_only_the_keys_that_it_names(recipe: Path) -> None:
    out = recipe.parent / "own"
    own = ["compress.method=tfwsvd", "compress.settings.steps=1"]
    api.compare(recipe, out, own, ratios=[0.6], labels=["tfwsvd"])
    (entry,) = json.loads((out / "compare.json").read_text())["entries"]
    assert entry["settings"] == {"iterations": 2, "steps": 1}


def test_an_unknown_method_or_ratio_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'svd_llm'"):
        api.compare(recipe, recipe.parent / "no", labels=["svd_lm"])
    with pytest.raises(RecipeError, match="kept ratios"):
        api.compare(recipe, recipe.parent / "no", ratios=[1.5])


def test_a_comparison_is_not_written_into_what_it_reads(recipe: Path) -> None:
    model = load_recipe(recipe).model.path
    assert model is not None
    before = sorted(model.iterdir())
    for place in (model, model / "comparison"):
        with pytest.raises(RecipeError, match="lies in the input"):
            api.compare(recipe, place, labels=["svd"])
    assert sorted(model.iterdir()) == before


def test_what_was_measured_on_the_same_tokens_is_not_measured_again(recipe: Path) -> None:
    def entries(*labels: str, change: str = "calibration.precision=float32") -> dict[str, object]:
        out = recipe.parent / "resumed"
        api.compare(recipe, out, [change], ratios=[0.7], labels=labels)
        found = json.loads((out / "compare.json").read_text())["entries"]
        return {entry["label"]: entry for entry in found}

    first = entries("svd_llm")
    second = entries("svd_llm", "svd")
    assert list(second) == ["svd", "svd_llm"]
    assert second["svd_llm"] == first["svd_llm"]  # to the seconds that it took
    third = entries("fwsvd", change="calibration.samples=3")
    assert list(third) == ["fwsvd"]  # other tokens: what was there cannot stand beside it
    other = recipe.parent / "other"
    shutil.copytree(recipe.parent / "model", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert list(entries("svd", change=f"model.path={recipe.parent / 'model'}")) == ["svd"]
    assert list(entries("fwsvd", change=f"model.path={other}")) == ["fwsvd"]  # another model


def entry_of(label: str, allocate: str, figure: Figure) -> Entry:
    return Entry(label, "source", "svd", {}, allocate, {}, False, (figure,))


def test_the_table_and_the_picture_hold_every_figure() -> None:
    entries = tuple(
        entry_of(c.label, c.allocate, Figure(0.8, 0.79, 30.0 * i, 1.0))
        for i, c in enumerate(CONTENDERS, start=1)
    )
    broken = entry_of("x < y", "uniform", Figure(0.8, 0.8, float("inf"), 1.0))
    found = Comparison("0", "model", 23.6, (0.8,), 1, 1, {}, (*entries, broken))
    lines = table(found).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(entries) + 1
    assert "| svd | uniform | 30 (0.790) |" in lines
    root = ElementTree.fromstring(picture(found))
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == len(entries) + 1  # and one of the legend
    assert all(0 < float(node.attrib["cx"]) < 640 for node in circles)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.stem)
def test_a_papers_recipe_runs_with_its_sizes_cut(recipe: Path, paper: Path) -> None:
    folder = recipe.parent
    text = paper.read_text()
    assert text.startswith("# ")
    assert "At 7B: " in text
    given = (
        f"model.path={folder / 'model'}",
        f"calibration.file={folder / 'text.txt'}",
        f"evaluate.text={folder / 'text.txt'}",
    )
    checked_paper = folder / f"{paper.stem}.yaml"
    checked_paper.write_text(text)
    overrides = (*given, *CUT, *MORE.get(paper.stem, ()))
    if paper.stem == "emb_ae":  # not a linear: tests/e2e/test_embedding.py looks closer
        made = Checkpoint.open(api.compress(checked_paper, folder / "paper-emb_ae", overrides))
        assert made.has("model.embed_tokens.lr_a.weight")
        return
    checked(checked_paper, f"paper-{paper.stem}", *overrides)
