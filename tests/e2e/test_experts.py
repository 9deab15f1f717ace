"""A whole run on a mixture of experts: GGUF with stacked pairs, ONNX with the products."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_pipeline import RECIPE, SIZES, UNTIMED, svdexport
from tests.unit.gguf_models import make_model
from tests.unit.test_gguf_architectures import MODELS

EXPORTS = """\
export:
  - {format: gguf, type: F32}
  - {format: gguf, type: Q4_0}
  - {format: onnx, precision: fp32}
evaluate:"""


@pytest.mark.slow
def test_a_mixture_passes_the_whole_run(tmp_path: Path) -> None:
    model, config, _ = MODELS["mixtral"]
    make_model(tmp_path / "model", model, **config, **SIZES)
    start, end = RECIPE.index("export:"), RECIPE.index("evaluate:")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE[:start] + EXPORTS + RECIPE[end + len("evaluate:") :])
    more = ["--set", "compress.stream=never", "--set", "quantize.algorithm=gptq"]
    found = svdexport("run", recipe, "--out", tmp_path / "done", *UNTIMED, *more)
    kept = [artifact for artifact in found["artifacts"] if artifact["kept"]]
    assert {a["path"] for a in kept} == {"model-F32.gguf", "model-Q4_0.gguf", "onnx-fp32"}
    for artifact in kept:
        assert artifact["round_trip"] == []
        assert artifact["parity"]["problems"] == []
    assert kept[0]["parity"]["relative"] < 1e-4
    shown = svdexport("inspect", tmp_path / "done" / "model-F32.gguf")
    forms = {(entry["name"], entry["form"]) for entry in shown["linears"]}
    assert ("ffn_down_exps", "pair") in forms
