"""The web page, driven in headless Chromium without a network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from svdexport.checkpoint import Checkpoint
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.unit.test_export_onnx import SHARED, run_export
from tests.unit.tiny_checkpoints import compress, make_model
from tests.unit.tool_modules import load_tool

DEMO = Path(__file__).parents[2] / "tools" / "web_demo"
MODULES = Path(os.environ.get("SVDEXPORT_NODE_MODULES", DEMO / "node_modules"))


def test_missing_libraries_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="npm install"):
        load_tool("web_demo/serve.py").libraries(tmp_path)


@pytest.mark.slow
def test_the_page_answers_as_onnxruntime_does(tmp_path: Path) -> None:
    serve = load_tool("web_demo/serve.py")
    if not any(shutil.which(name) for name in serve.BROWSERS):
        pytest.skip("chromium is not installed")
    if not (MODULES / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: npm install --prefix tools/web_demo")
    source = tmp_path / "source"
    make_model(source, "llama")
    low = compress(source, tmp_path / "low", SHARED)
    for name, checkpoint in (("dense", Checkpoint.open(source)), ("compressed", low)):
        run_export(source, checkpoint, tmp_path / name, "fp32")
    server = serve.PageServer(tmp_path / "dense", tmp_path / "compressed", MODULES, patience=120)
    picture = tmp_path / "page.png"
    found = serve.photograph(server, picture, "hello there", tokens=8, threads=1)
    assert "error" not in found
    assert found["outside"] == []
    assert picture.stat().st_size > 5000
    for name in ("dense", "compressed"):
        runtime = OrtRuntime(tmp_path / name, threads=1)
        made = runtime.generate(runtime.tokenize("hello there"), 8)
        assert found[name]["tokens"] == len(made)
        assert found[name]["text"] == runtime.detokenize(made)
        assert found[name]["bytes"] == sum(
            (tmp_path / name / file).stat().st_size
            for file in ("model_last.onnx", "model.onnx.data")
        )
        assert found[name]["decode"] > 0
        runtime.close()
