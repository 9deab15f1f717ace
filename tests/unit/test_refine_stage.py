"""The refinement stages of a run: files, notes, resuming, quantisers' weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.errors import RecipeError
from svdexport.models.loader import load_model
from svdexport.recipe import load_recipe
from tests.unit.tiny_checkpoints import make_model

RECIPE = """\
schema: 1
model: {path: m}
calibration: {samples: 10, length: 32}
compress: {budget: {param_ratio: 0.6}, rank_multiple: 8}
refine: {method: distill, steps: 6, batch: 2, learning_rate: 2e-3, samples: 12}
export: [{format: checkpoint}]
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    make_model(folder / "m", "llama-tied")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def test_the_refined_checkpoint_is_what_exporters_get(place: Path) -> None:
    found = api.compress(place / "r.yaml", place / "o")
    work = place / ".o.work"
    assert found == work / "refined"
    before, after = Checkpoint.open(work / "checkpoint"), Checkpoint.open(found)
    assert after.low_rank == before.low_rank
    assert after.names() == before.names()
    for name in after.names():
        changed = ".lr_" in name
        assert torch.equal(after.tensor(name), before.tensor(name)) != changed
        assert after.tensor(name).dtype == before.tensor(name).dtype

    weights = load_file(work / "base" / "importance.safetensors")
    calibration = load_file(work / "tokens.safetensors")["calibration"]
    leader, members = next(iter(after.groups.items()))
    inputs: list[torch.Tensor] = []
    model = load_model(found)
    hook = model.get_submodule(leader).register_forward_pre_hook(lambda _m, x: inputs.append(x[0]))
    model(calibration)
    hook.remove()
    rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
    seen = rows @ after.tensor(f"{leader}.lr_a.weight").double().T
    assert torch.allclose(weights[f"{leader}.rank"].double(), seen.pow(2).mean(0), rtol=1e-4)
    for member in members:
        expected = rows.pow(2).mean(0)
        assert torch.allclose(weights[f"{member}.inputs"].double(), expected, rtol=1e-4)

    kept = (found / "model.safetensors").read_bytes()
    stages = sorted((work / "stages").iterdir())
    times = [path.stat().st_mtime_ns for path in stages]
    assert api.compress(place / "r.yaml", place / "o") == found
    assert [path.stat().st_mtime_ns for path in stages] == times  # nothing ran again
    assert (found / "model.safetensors").read_bytes() == kept


def test_a_run_publishes_the_refined_weights_and_says_how(place: Path) -> None:
    outcome = api.run(place / "r.yaml", place / "done")
    assert outcome.out is not None
    result = outcome.result
    assert "refine distill" in [stage.name for stage in result.stages]
    assert any(note.startswith("distill: 6 steps, 384 tokens") for note in result.notes)
    assert result.seeds["refine.0"] == 0
    assert not (place / ".done.work" / "refined").exists()


def test_a_run_of_another_model_is_not_the_published_one(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "m", tmp_path / "m")
    (tmp_path / "r.yaml").write_text(RECIPE)
    quick = ["refine.steps=1"]
    first = api.run(tmp_path / "r.yaml", tmp_path / "o", quick)
    again = api.run(tmp_path / "r.yaml", tmp_path / "o", quick)
    assert again.result == first.result
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    other = api.run(tmp_path / "r.yaml", tmp_path / "o", quick)
    assert other.result.source != first.result.source
    assert (
        Checkpoint.open(tmp_path / "o" / "checkpoint")
        .tensor("model.norm.weight")
        .equal(weights["model.norm.weight"])
    )


def test_two_refiners_of_one_method_are_not_repeated(place: Path) -> None:
    entry = "{method: distill, steps: 1, batch: 2, samples: 4}"
    line = next(line for line in RECIPE.splitlines() if line.startswith("refine"))
    (place / "twice.yaml").write_text(RECIPE.replace(line, f"refine: [{entry}, {entry}]"))
    found = api.compress(place / "twice.yaml", place / "twice")
    stages = sorted((place / ".twice.work" / "stages").glob("refine*"))
    assert len(stages) == 2
    times = [path.stat().st_mtime_ns for path in stages]
    assert api.compress(place / "twice.yaml", place / "twice") == found
    assert [path.stat().st_mtime_ns for path in stages] == times


def test_experts_that_stayed_dense_are_trained_too(tmp_path: Path) -> None:
    """Mixtral's files name them otherwise than its modules."""
    make_model(tmp_path / "m", "mixtral")
    (tmp_path / "r.yaml").write_text(RECIPE)
    how = ["refine.train=linears", "refine.learning_rate=5e-4", "compress.ignore=[re:experts]"]
    found = api.compress(tmp_path / "r.yaml", tmp_path / "o", how)
    before, after = Checkpoint.open(tmp_path / ".o.work" / "checkpoint"), Checkpoint.open(found)
    assert after.names() == before.names()
    experts = [name for name in after.names() if ".block_sparse_moe.experts." in name]
    moved = [n for n in experts if not torch.equal(after.tensor(n), before.tensor(n))]
    assert len(experts) == 24 and len(moved) > 12


@pytest.mark.parametrize("labels", ["text", "both"])
def test_als_works_in_the_metric_that_the_factors_were_made_in(place: Path, labels: str) -> None:
    """Where they are its optimum there is nothing to gain."""
    line = next(line for line in RECIPE.splitlines() if line.startswith("refine"))
    (place / "als.yaml").write_text(RECIPE.replace(line, "refine: {method: als, iterations: 4}"))
    how = [f"compress.settings.labels={labels}"]
    api.compress(place / "als.yaml", place / labels, how)
    (note,) = json.loads((place / f".{labels}.work" / "refine" / "1-als.json").read_text())
    found = re.search(r"metric by (.+)%$", note)
    assert found and abs(float(found[1])) < 0.1


def test_what_a_recipe_may_say(place: Path) -> None:
    recipe = load_recipe(place / "r.yaml", ["refine.minutes=3"])
    assert [(entry.method, entry.steps, entry.minutes) for entry in recipe.refine] == [
        ("distill", 6, 3.0)
    ]
    for override, message in (
        ("refine.steps=null", "refine.0: say how long: give steps, minutes or both"),
        ("refine.method=distil", "refine.0.method: 'distil' is not one of distill"),
        ("refine.learning_rat=1", "refine.0.learning_rat: unknown key; did you mean"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(place / "r.yaml", [override])
