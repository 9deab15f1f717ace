"""The same recipe twice gives the same bytes, also where GPTQ has chosen the quantised values."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from svdexport import api
from tests.unit.gguf_models import make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 8, length: 32, seed: 1}
compress: {method: kfac_svd, budget: {param_ratio: 0.7}, rank_multiple: 32}
quantize: {algorithm: gptq}
export:
  - {format: gguf, type: Q4_0}
  - {format: onnx, precision: int4}
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""


@pytest.mark.slow
def test_exports_of_two_runs_are_equal(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=192)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = []
    for name in ("one", "two"):
        written = api.export(tmp_path / "recipe.yaml", tmp_path / name)
        assert len(written) == 2
        files = [f for path in written for f in ([path] if path.is_file() else path.rglob("*"))]
        found.append(
            {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
        )
    assert {"model-Q4_0.gguf", "model.onnx"} <= set(found[0])
    assert found[0] == found[1]
