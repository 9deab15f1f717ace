"""``budget: {speedup: ...}``: the largest share of parameters that is fast enough."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svdexport import api
from svdexport.allocate import Allocation, Candidate, uniform
from svdexport.core import product_time
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


def seconds_of(
    shapes: Sequence[tuple[int, int]], weight: float = 1e-6, product: float = 1.0
) -> float:
    """A machine that takes a time for each product, and one for each weight."""
    return product * len(shapes) + weight * sum(rows * columns for rows, columns in shapes)


def test_products_are_timed_dense_and_at_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between and beyond them is on the line through both."""
    asked: list[list[tuple[int, int]]] = []

    def seconds(shapes: Sequence[tuple[int, int]]) -> float:
        asked.append(list(shapes))
        return seconds_of(shapes)

    monkeypatch.setattr(product_time, "_seconds", seconds)
    found = time_products((1024, 512), 2048, 512)
    assert asked == [
        [(1024, 2048), (512, 2048)],
        [(128, 2048), (1024, 128), (512, 128)],
        [(512, 2048), (1024, 512), (512, 512)],
    ]
    assert found.at(None) == pytest.approx(seconds_of([(1024, 2048), (512, 2048)]))
    for rank in (1, 64, 128, 300, 512, 700):
        pair = [(rank, 2048), (1024, rank), (512, rank)]
        assert found.at(rank) == pytest.approx(seconds_of(pair))


@pytest.mark.parametrize("high", [1, 3, 64])
def test_what_is_too_small_to_tell_is_in_proportion_to_the_rank(
    monkeypatch: pytest.MonkeyPatch, high: int
) -> None:
    monkeypatch.setattr(product_time, "_seconds", lambda shapes: float(len(shapes)))
    found = time_products((32, 32), 64, high)
    assert (found.at(None), found.at(high)) == (2.0, 3.0)
    assert found.at(5) == pytest.approx(3.0 * 5 / high)


def test_a_products_seconds_are_of_the_best_round_over_copies_that_fill_no_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([0.0, 10.0, 20.0, 24.0, 30.0, 36.0])  # rounds of 10, 4 and 6 seconds
    monkeypatch.setattr(product_time, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    # 6 MB of weights, 22 times: over 128 MB
    assert product_time._seconds([(1024, 1024), (512, 1024)]) == pytest.approx(4 / 22)


def test_real_products_take_time() -> None:
    found = time_products((1024, 1024), 2048, 512)
    assert found.at(None) > 0 and found.at(64) > 0


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


def test_a_run_and_a_plan_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose products take a nanosecond for each weight, and little else."""
    monkeypatch.setattr(product_time, "_seconds", lambda shapes: 1e-9 * seconds_of(shapes, 1, 10))
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    (tmp_path / "text.txt").write_text(WORDS * 60)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    planned = api.plan(path)
    assert 1.3 <= planned["predicted_speedup"] < 1.4
    ranks = {name: row["rank"] for row in planned["groups"] for name in row["linears"]}
    assert any(ranks.values())
    folder = api.compress(path, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    written = config["quantization_config"]["low_rank"]
    assert {name: entry["rank"] for name, entry in written.items()} == ranks
    rows = api.compress_model(
        load_model(tmp_path / "model"),
        torch.zeros((1, 16), dtype=torch.int64),
        method="svd",
        allocate="uniform",
        rank_multiple=8,
        budget={"speedup": 1.3},
    )
    assert {row.name: row.rank for row in rows} == ranks
    kept = sum(row.params for row in rows) / sum(row.params_dense for row in rows)
    assert kept == pytest.approx(planned["kept"])
