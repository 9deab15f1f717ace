"""A whole run whose GGUF files are for a stock llama.cpp, or have a type for each part."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.test_pipeline import RECIPE, SIZES, UNTIMED, svdexport
from tests.unit.gguf_models import make_model

EXPORTS = """\
export:
  - {format: gguf, type: F32, form: stock}
  - {format: gguf, type: F32, form: stock_lora}
  - {format: gguf, type: Q4_0, type_a: F16, type_b: F16, form: stock_lora, base: weight}
  - {format: gguf, type: F16, type_b: Q8_0, embedding_type: Q8_0}
evaluate:"""


def test_forms_and_types_pass_the_whole_run(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", **SIZES)
    start, end = RECIPE.index("export:"), RECIPE.index("evaluate:")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE[:start] + EXPORTS + RECIPE[end + len("evaluate:") :])
    found = svdexport("run", recipe, "--out", tmp_path / "done", *UNTIMED)
    kept = {a["path"]: a for a in found["artifacts"] if a["kept"]}
    stock, lora, fitted, mixed = (
        "model-F32-stock",
        "model-F32-stock-lora",
        "model-Q4_0-a-F16-b-F16-stock-lora-weight",
        "model-F16-b-Q8_0-embedding-Q8_0",
    )
    assert set(kept) == {f"{name}.gguf" for name in (stock, lora, fitted, mixed)}
    for artifact in found["artifacts"]:
        assert artifact["round_trip"] == []
        assert artifact["role"] == "plain" or artifact["parity"]["problems"] == []
    # the remainder and its adapter together are the dense model
    assert kept[f"{lora}.gguf"]["quality"]["mean_kld"] < 1e-3
    assert kept[f"{stock}.gguf"]["quality"]["mean_kld"] > 1e-3
    # pairs fitted to what Q4_0 loses of W bring the file nearer to the dense model than Q4_0 is
    dense = next(a for a in found["artifacts"] if a["path"] == f"dense/{fitted}.gguf")
    assert kept[f"{fitted}.gguf"]["quality"]["mean_kld"] < dense["quality"]["mean_kld"]
    files = json.loads((tmp_path / "done" / "manifest.json").read_text())["files"]
    assert {f"{lora}.gguf", f"{lora}.lora.gguf"} <= set(files)
    assert svdexport("verify", tmp_path / "done")["ok"] is True
