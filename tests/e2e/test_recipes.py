"""Each shipped recipe runs, on a small random model and with its sizes cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdexport import api
from svdexport.recipe import load_recipe
from tests.unit.gguf_models import make_model

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
CUT = (
    "calibration.samples=8",
    "calibration.length=48",
    "evaluate.context=48",
    "evaluate.windows=2",
    "speed.rounds=1",
    "speed.prefill=[16]",
    "speed.decode=4",
    "speed.threads=1",
    "gates.max_perplexity_ratio=1000000.0",
)
# A random model has no quality to lose, and one round is too few for a speed gate.
GATES = ("min_prefill_speedup", "min_decode_speedup", "min_same_top", "max_mean_kld")
NEEDED = {
    "browser-onnx",
    "ci-release",
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "model"
    return make_model(folder, "Llama", hidden_size=512, intermediate_size=768)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_recipe_runs(name: str, model: Path, tmp_path: Path) -> None:
    path = RECIPES[0].with_name(f"{name}.yaml")
    recipe = load_recipe(path)
    gates = [gate for gate in GATES if getattr(recipe.gates, gate) is not None]
    overrides = [*CUT, f"model.path={model}", *(f"gates.{gate}=null" for gate in gates)]
    outcome = api.run(path, tmp_path / "out", overrides)
    assert outcome.result.verdict.reasons == ()
    assert outcome.out is not None
    kept = {a.path for a in outcome.result.artifacts if a.kept}
    assert len(kept) == len(recipe.export)
    assert any(row.rank is not None for row in outcome.result.plan)
    assert all((outcome.out / path).exists() for path in kept)
