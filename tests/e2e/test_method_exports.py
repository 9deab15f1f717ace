"""Every method's pairs in every runtime: the written files compute what the checkpoint does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svdexport.checkpoint import Checkpoint
from svdexport.errors import RecipeError
from svdexport.export import ExportRequest, exporter
from svdexport.factorize import METHODS
from svdexport.models.loader import load_model
from svdexport.recipe import CheckpointExport, Export, GgufExport, OnnxExport, load_recipe
from svdexport.runtimes.base import Runtime
from svdexport.runtimes.ggml import supports_low_rank
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from svdexport.runtimes.ort_rt import OrtRuntime
from tests.e2e.test_methods import checked, written_recipe
from tests.unit.gguf_models import torch_logits

TOKENS = np.random.default_rng(0).integers(3, 259, 40)
OF_LINEARS = sorted(name for name, method in METHODS.items() if not method.embedding)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_recipe(tmp_path_factory.mktemp("method-exports"))


def written(recipe: Path, made: Checkpoint, spec: Export, suffix: str = "") -> Path:
    """An export of a compressed checkpoint, every tensor of which reads back as it was meant."""
    out = made.path.with_name(f"export-{spec.format}{suffix}")
    source = recipe.parent / "model"
    work = recipe.parent / "work"  # the converter's output for the dense model is made once
    work.mkdir(exist_ok=True)
    module = exporter(spec.format)
    found = module.export(ExportRequest(made, source, None, out, work, spec))
    assert module.check_round_trip(found.path, found.tensors) == []
    return found.path


def same(runtime: Runtime, expected: np.ndarray, tolerance: float) -> None:
    found = runtime.logits(TOKENS)
    runtime.close()
    assert np.abs(found - expected).max() < tolerance * expected.std()


@pytest.mark.parametrize("method", OF_LINEARS)
def test_a_methods_pairs_go_into_every_format(recipe: Path, method: str) -> None:
    found = checked(recipe, method, f"compress.method={method}")
    names = {name.rpartition(".")[2] for name in found.low_rank}
    if method == "lorc":
        assert names == {"k_proj", "v_proj"}
        assert all(spec.group == name for name, spec in found.low_rank.items())
    else:
        assert {"q_proj", "k_proj", "o_proj", "up_proj", "down_proj"} <= names
    expected = torch_logits(load_model(found.path), TOKENS)
    onnx = written(recipe, found, OnnxExport(precision="fp32"))
    same(OrtRuntime(onnx, threads=1), expected, 1e-4)
    again = load_model(written(recipe, found, CheckpointExport(dtype="float32")))
    assert np.array_equal(torch_logits(again, TOKENS), expected)
    file = written(recipe, found, GgufExport(type="F32"), ".gguf")
    if supports_low_rank():
        same(LlamaCppRuntime(file, threads=1, context=64, exact=True), expected, 5e-3)


def embedding(recipe: Path, export: str, refine: str = "[]") -> None:
    text = recipe.read_text().replace("method: svd_llm", "method: emb_ae")
    path = recipe.with_name("emb_ae.yaml")
    text = text.replace("export: [{format: checkpoint}]", f"export: [{export}]")
    path.write_text(f"{text}refine: {refine}\n")
    load_recipe(path)


@pytest.mark.parametrize(
    "export",
    ["{format: gguf, type: Q8_0}", "{format: gguf, type: F16, form: stock_lora}", "{format: onnx}"],
)
def test_the_embeddings_method_is_refused_where_no_runtime_has_it(
    recipe: Path, export: str
) -> None:
    embedding(recipe, "{format: checkpoint}")
    with pytest.raises(RecipeError, match=r"emb_ae makes a low-rank embedding, which no runtime"):
        embedding(recipe, export)


@pytest.mark.parametrize(
    "refine",
    ["{method: als}", "{method: sequential_ls}", "{method: lora, steps: 1}",
     "{method: distill, steps: 1}", "[{method: als}, {method: distill, minutes: 1}]"],
)  # fmt: skip
def test_the_embeddings_method_takes_no_refiner(recipe: Path, refine: str) -> None:
    with pytest.raises(RecipeError, match=r"refine: .* emb_ae makes none; leave it out"):
        embedding(recipe, "{format: checkpoint}", refine)
