"""``budget: {speedup: ...}``: the largest share of parameters that is fast enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from svdexport import api
from svdexport.allocate import Allocation, Candidate, uniform
from svdexport.core.product_time import ProductTime, time_products
from svdexport.errors import RecipeError
from svdexport.models.loader import load_model
from svdexport.pipeline.speed_budget import SpeedModel, choose
from svdexport.recipe import load_recipe
from tests.unit.gguf_models import WORDS, make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {source: file, file: text.txt, samples: 2, length: 32}
compress: {method: svd, budget: {speedup: 1.3}, allocate: uniform, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 32, windows: 1}
"""
ITEMS = [Candidate("one", 256, 256), Candidate("two", 512, 256)]


def allocate(ratio: float) -> dict[str, Allocation]:
    return uniform.allocate(ITEMS, ratio, 4)


def model(rest: float) -> SpeedModel:
    """A machine on which every multiplication takes a nanosecond, and every pair ten more."""
    return SpeedModel(
        {
            x.name: ProductTime(
                x.dense_params * 1e-9, 1e-8, (x.out_features + x.in_features) * 1e-9
            )
            for x in ITEMS
        },
        rest,
    )


@pytest.mark.parametrize("wanted", [1.1, 1.5, 2.5])
def test_the_largest_share_that_is_fast_enough(wanted: float) -> None:
    timed = model(rest=2e-5)
    chosen = choose(timed, wanted, allocate)
    assert timed.speedup(chosen) >= wanted
    ranks = {name: found.rank for name, found in chosen.items()}
    faster = [r for r in range(1, 1000) if timed.speedup(allocate(r / 1000)) >= wanted]
    best = {name: found.rank for name, found in allocate(max(faster) / 1000).items()}
    assert ranks == best


def test_speedup_is_all_seconds_over_all_seconds() -> None:
    timed = SpeedModel({"one": ProductTime(8.0, 1.0, 0.5), "two": ProductTime(6.0, 1.0, 0.5)}, 2.0)
    chosen = {"one": Allocation(4), "two": Allocation(None)}
    assert timed.speedup(chosen) == (2 + 8 + 6) / (2 + (1 + 4 * 0.5) + 6)


def test_what_no_rank_gives_is_refused_with_what_they_give() -> None:
    with pytest.raises(RecipeError, match=r"speedup: 50 is out of reach: .* give \d"):
        choose(model(rest=1e-4), 50.0, allocate)


def test_a_small_rank_takes_less_time_than_the_dense_product() -> None:
    found = time_products((1024, 1024), 2048, 512)
    assert 0 < found.at(64) < found.at(512)
    assert found.at(64) < found.at(None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["compress.budget.param_ratio=0.8"], "exactly one"),
        (["compress.allocate=dobi_svd"], "dobi_svd"),
        (["compress.method=emb_ae"], "embedding"),
        (["compress.budget.speedup=1"], "speedup"),
    ],
)
def test_refusals(tmp_path: Path, changes: list[str], words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "recipe.yaml", changes)


def test_a_run_and_a_plan_take_it(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=512, intermediate_size=1024)
    (tmp_path / "text.txt").write_text(WORDS * 60)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    planned = api.plan(path)
    assert planned["predicted_speedup"] >= 1.3
    assert 0.1 < planned["kept"] < 0.95
    folder = api.compress(path, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["low_rank"]
    rows = api.compress_model(
        load_model(tmp_path / "model"),
        torch.zeros((1, 16), dtype=torch.int64),
        method="svd",
        allocate="uniform",
        rank_multiple=8,
        budget={"speedup": 1.3},
    )
    assert 0.1 < sum(r.params for r in rows) / sum(r.params_dense for r in rows) < 0.95
