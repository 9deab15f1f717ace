"""What ``svdexport methods`` and ``svdexport plan`` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svdexport import api
from svdexport.allocate import Allocation
from svdexport.checkpoint import Checkpoint
from svdexport.cli import app
from svdexport.export import ExportRequest, exporter
from svdexport.export.gguf_size import exact_bytes, header_of
from svdexport.factorize import METHODS
from svdexport.models.shapes import shapes_of
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.sizes import weight_bytes
from svdexport.recipe import CheckpointExport, Export, GgufExport, OnnxExport, load_recipe
from svdexport.refine import REFINERS
from tests.unit.gguf_models import make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 2, length: 16}
evaluate: {context: 16, windows: 1}
compress: {method: svd_llm, budget: {param_ratio: 0.7}, allocate: uniform, rank_multiple: 8}
export: [{format: checkpoint}]
"""


def printed(*command: str) -> str:
    done = CliRunner().invoke(app, list(command), env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_method_and_refiner_has_a_row() -> None:
    found = json.loads(printed("methods", "--json"))
    assert [row["name"] for row in found["methods"]] == list(METHODS)
    assert [row["name"] for row in found["refiners"]] == [f"refine: {name}" for name in REFINERS]
    lines = printed("methods").splitlines()
    for row in [*found["methods"], *found["refiners"]]:
        assert row["title"] and row["source"]
        assert any(
            row["name"] in line and row["title"] in line and row["source"] in line for line in lines
        ), row
    for row in found["methods"]:
        assert set(row["needs"].split(", ")) - {""} == METHODS[row["name"]].needs
        assert any(character.isdigit() for character in row["source"])  # a year, a number


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    make_model(folder / "model", "Llama", hidden_size=64, intermediate_size=96)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def test_the_plan_is_a_table_whose_rows_add_up(recipe: Path) -> None:
    found: dict[str, Any] = json.loads(printed("plan", str(recipe), "--json"))
    lines = printed("plan", str(recipe)).splitlines()
    rows = found["groups"]
    assert len(rows) == 2 * 4
    for row in rows:
        m, n = row["shape"]
        assert row["params"] == row["rank"] * (m + n)
        names = " ".join(name.rpartition(".")[2] for name in row["linears"])
        share = f"{row['params'] / row['params_dense']:.1%}"
        cells = (names, f"{m}x{n}", str(row["rank"]), share)
        assert sum(all(cell in line for cell in cells) for line in lines) >= 2  # in both blocks
    params, dense = (sum(row[key] for row in rows) for key in ("params", "params_dense"))
    assert (params, dense) == (found["params"], found["params_dense"])
    total = f"kept {params / dense:.1%} of {dense:,} parameters ({1 - params / dense:.1%} removed)"
    assert total in lines
    (file,) = found["exports"]
    assert any(f"{file['weight_bytes']:,}" in line for line in lines)


@pytest.mark.parametrize(
    "spec",
    [GgufExport(type="Q8_0"), OnnxExport(precision="int4"), CheckpointExport(dtype="float16")],
    ids=lambda spec: spec.format,
)
def test_bytes_of_unequal_ranks_are_those_of_the_file(recipe: Path, spec: Export) -> None:
    """What ``plan`` counts with, for ranks that a run chose: some groups stay dense."""
    unequal = ["compress.allocate=lorc", "compress.allocation.protect=1"]
    made = api.compress(recipe, recipe.parent / "made", [*unequal, "compress.rank_multiple=4"])
    shapes = shapes_of(recipe.parent / "model")
    groups = chosen_groups(load_recipe(recipe), shapes.structure)
    checkpoint = Checkpoint.open(made)
    pairs = checkpoint.low_rank
    chosen = {g.leader: Allocation(pairs[g.leader].rank if g.leader in pairs else None)
              for g in groups}  # fmt: skip
    assert len({choice.rank for choice in chosen.values()}) > 2
    assert None in {choice.rank for choice in chosen.values()}
    work = recipe.parent / "work"
    work.mkdir(exist_ok=True)
    out = recipe.parent / f"file-{spec.format}"
    out = out.with_suffix(".gguf") if spec.format == "gguf" else out
    request = ExportRequest(checkpoint, recipe.parent / "model", None, out, work, spec)
    written = exporter(spec.format).export(request)
    if isinstance(spec, GgufExport):  # the whole file
        (work / "header").mkdir()
        header = header_of(recipe.parent / "model", shapes.parameters, "float32", work / "header")
        dims = {x.name: (x.out_features, x.in_features) for x in shapes.structure.linears()}
        planned = exact_bytes(spec, header, pairs, {name: dims[name] for name in pairs})
        assert written.path.stat().st_size == planned
    else:
        found = sum(record.nbytes for record in written.tensors.values())
        assert found == weight_bytes(spec, shapes, groups, chosen, "float32")
