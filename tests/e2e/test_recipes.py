"""Each shipped recipe runs on the model that it names, with its sizes cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svdexport import api
from svdexport.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CUT = (
    "calibration.samples=32",  # with 400 tokens Q2_K leaves noise, whose parity nothing can tell
    "calibration.length=128",
    "evaluate.context=48",
    "evaluate.windows=2",
    "speed.rounds=1",
    "speed.prefill=[16]",
    "speed.decode=4",
    "speed.threads=2",
)
# So little calibration keeps no quality, and one round is too few for a speed gate.
GATES = (
    "max_perplexity_ratio",
    "max_mean_kld",
    "min_same_top",
    "min_cosine",
    "min_rank_correlation",
    "min_prefill_speedup",
    "min_decode_speedup",
)
NEEDED = {
    "browser-onnx",
    "ci-release",
    "encoder-onnx",
    "extreme-2bit",
    "laptop-gguf",
    "mobile-onnx",
    "quickstart",
    "stock-llamacpp",
}


def test_the_recipes_are_there_and_say_what_they_are_for() -> None:
    assert {path.stem for path in RECIPES} >= NEEDED
    for path in RECIPES:
        head = path.read_text().splitlines()[0]
        assert head.startswith("# ") and len(head) > 40
        load_recipe(path)


def own_model(name: str) -> list[str]:
    """Where the encoder and its texts are; `make setup` puts the demo model where recipes look."""
    if name != "encoder-onnx":
        return []
    command = [sys.executable, str(ROOT / "tools" / "fetch_encoder.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    folder = printed.strip().splitlines()[-1]
    return [
        f"model.path={folder}",
        f"calibration.file={folder}/text-calibration.txt",
        f"evaluate.text={folder}/text-evaluation.txt",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_recipe_runs(name: str, tmp_path: Path) -> None:
    path = RECIPES[0].with_name(f"{name}.yaml")
    recipe = load_recipe(path)
    gates = [gate for gate in GATES if getattr(recipe.gates, gate) is not None]
    overrides = [*CUT, *own_model(name), *(f"gates.{gate}=null" for gate in gates)]
    outcome = api.run(path, tmp_path / "out", overrides)
    assert outcome.result.verdict.reasons == ()
    assert outcome.out is not None
    kept = {a.path for a in outcome.result.artifacts if a.kept}
    assert len(kept) == len(recipe.export)
    assert any(row.rank is not None for row in outcome.result.plan)
    assert all((outcome.out / path).exists() for path in kept)
