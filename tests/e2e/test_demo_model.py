"""The demo model itself: `make setup` puts it under models/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.export import ExportRequest, exporter
from svdexport.models.loader import load_model
from svdexport.recipe import GgufExport
from svdexport.runtimes import open_runtime
from tests.e2e.test_pipeline import svdexport

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPT = "The capital of France is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickstart on the text that it is shipped to write, with one timing round."""
    out = tmp_path_factory.mktemp("demo") / "quickstart"
    settings = {
        "speed.rounds": 1,
        "speed.prefill": "[128]",
        "speed.decode": 16,
        "gates.max_perplexity_ratio": 4.0,
        "gates.max_mean_kld": 2.0,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    recipe = ROOT / "recipes" / "quickstart.yaml"
    return svdexport("run", recipe, "--out", out, "--quiet", *overrides)


def test_the_quickstart_passes_its_checks(finished: dict[str, Any]) -> None:
    assert finished["verdict"]["word"] == "pass"
    for artifact in finished["artifacts"]:
        assert artifact["round_trip"] == []
        assert artifact["role"] == "plain" or artifact["parity"]["problems"] == []
        if artifact["role"] == "dense":
            assert artifact["quality"]["mean_kld"] < 0.03
            assert artifact["quality"]["same_top"] > 0.85


@pytest.mark.parametrize(
    ("name", "runtime"), [("model-Q8_0.gguf", "llama.cpp"), ("onnx-int8", "onnxruntime-genai")]
)
def test_it_still_knows_the_capital_of_france(
    finished: dict[str, Any], name: str, runtime: str
) -> None:
    path = Path(finished["out"]) / name
    opened = open_runtime(path, threads=2, context=128, runtime=runtime)
    try:
        text = opened.detokenize(opened.generate(opened.tokenize(PROMPT), 4))
    finally:
        opened.close()
    assert text.startswith(" Paris")


def test_eval_of_a_dense_gguf_is_torchs_perplexity(tmp_path: Path) -> None:
    text, context, windows = ROOT / "LICENSE", 512, 2
    gguf = tmp_path / "dense.gguf"
    request = ExportRequest(
        Checkpoint.open(MODEL), MODEL, None, gguf, tmp_path, GgufExport(type="F16")
    )
    exporter("gguf").export(request)
    found = svdexport(
        "eval", gguf, "--text", text, "--context", context, "--windows", windows, "--quiet"
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    runtime = open_runtime(gguf, threads=2, context=64)
    written = text.read_text(encoding="utf-8")
    assert runtime.tokenize(written) == tokenizer(written, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: context * windows]).view(windows, context)
    model = load_model(MODEL)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert found["tokens"] == windows * (context - 1)
    assert found["perplexity"] == pytest.approx(float(np.exp(np.mean(losses))), rel=5e-3)
