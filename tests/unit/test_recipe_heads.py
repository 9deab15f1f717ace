"""What a recipe gave is written into its head, in place of what it gave before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from svdexport.core.measures import Verdict
from svdexport.recipe import load_recipe
from tests.unit.report_example import example_result as example
from tests.unit.tool_modules import load_tool

ROOT = Path(__file__).resolve().parents[2]
tool = load_tool("benchmarks/recipes.py")


def test_heads_take_the_figures_and_stay_recipes(tmp_path: Path) -> None:
    lines = tool.gave(example())
    assert any("perplexity" in line and "MB" in line for line in lines)
    for name in tool.NAMES:
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        once = tool.with_head(text, lines)
        assert tool.with_head(once, lines) == once
        assert once.splitlines()[0] == text.splitlines()[0]
        assert all(len(line) <= 98 for line in once.splitlines() if line.startswith("# Gave"))
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(once)
        new, old = load_recipe(path), load_recipe(ROOT / "recipes" / f"{name}.yaml")
        assert new.compress == old.compress and new.export == old.export


def test_a_noisy_machine_gives_no_speed() -> None:
    result = example()
    noisy = dataclasses.replace(result, verdict=Verdict("inconclusive", 7, ()))
    assert any("x (" in line for line in tool.gave(result))
    assert not any("x (" in line for line in tool.gave(noisy))
    artifacts = tuple(
        dataclasses.replace(
            artifact,
            speed=dataclasses.replace(
                artifact.speed,
                timings=tuple(
                    dataclasses.replace(t, disturbed_rounds=len(t.samples))
                    for t in artifact.speed.timings
                ),
            ),
        )
        if artifact.speed
        else artifact
        for artifact in result.artifacts
    )
    disturbed = dataclasses.replace(result, artifacts=artifacts)
    assert not any("x (" in line for line in tool.gave(disturbed))
