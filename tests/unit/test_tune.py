"""Norms trained behind quantised weights: what is trained, and that the file holds it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from svdexport import api
from svdexport.errors import InputError, RecipeError
from svdexport.models.decoder import Decoder
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import load_recipe
from svdexport.recipe.refiners import Tune
from svdexport.refine.divergence import divergence_of_hidden
from svdexport.refine.gains import gain, norms, tune
from tests.unit.gguf_models import make_model
from tests.unit.refine_models import data

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 12, length: 48, seed: 1}
compress: {method: kfac_svd, budget: {param_ratio: 0.7}, rank_multiple: 32}
quantize: {algorithm: gptq, tune: {steps: 12, batch: 4}}
export: [{format: gguf, type: Q4_0}, {format: gguf, type: Q4_0, form: stock}]
evaluate: {context: 48, windows: 2}
"""


def total(student: Decoder, dense: Decoder, tokens: torch.Tensor) -> float:
    """The divergence with each model's own head, summed."""
    hidden = student.hidden(tokens), dense.hidden(tokens)
    found, _ = divergence_of_hidden(student, tokens, *hidden, gradient=False, dense=dense)
    slow = torch.nn.functional.kl_div(
        student.module(tokens).logits.log_softmax(-1),
        dense.module(tokens).logits.log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    assert found == pytest.approx(float(slow), rel=1e-4)
    return found


def test_the_divergence_from_the_dense_models_own_head_falls(tmp_path: Path) -> None:
    given = data(tmp_path)
    dense = given.teacher()
    module = given.student.module
    with torch.no_grad():
        noise = torch.randn(module.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
        module.lm_head.weight += 0.02 * noise
    found = norms(given.student)
    kinds = ("input_layernorm", "post_attention_layernorm")
    assert list(found) == [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in kinds]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loss = total(given.student, dense, given.tokens)
    names = set(found) - {"model.layers.0.input_layernorm"}
    config = Tune(steps=40, learning_rate=0.02, batch=4)
    refined = tune(given, config, dense, names)
    assert set(refined.tensors) == {f"{name}.weight" for name in names}
    assert total(given.student, dense, given.tokens) < 0.98 * loss
    assert "tune: 40 steps" in refined.notes[0]
    after = module.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(refined.tensors)
    for name, part in norms(given.student).items():
        if name in names:
            assert torch.equal(gain(part), refined.tensors[f"{name}.weight"])


def values_of(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: np.array(t.data) for t in reader.tensors if t.name.endswith("norm.weight")}


@pytest.mark.slow
def test_the_files_hold_the_trained_gains(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    quiet = Reporter(quiet=True)
    tuned = api.export(tmp_path / "recipe.yaml", tmp_path / "a", reporter=quiet)
    plain = api.export(
        tmp_path / "recipe.yaml", tmp_path / "b", ["quantize.tune=null"], reporter=quiet
    )
    for one, other in zip(tuned, plain, strict=True):
        assert one.stat().st_size == other.stat().st_size
        mine, theirs = values_of(one), values_of(other)
        assert mine.keys() == theirs.keys()
        assert len(mine) == 5  # of two blocks, and the last
        assert np.array_equal(mine.pop("output_norm.weight"), theirs["output_norm.weight"])
        for name, values in mine.items():
            change = np.abs(values / theirs[name] - 1).max()
            assert 1e-4 < change < 0.3
    work = tmp_path / ".a.work"
    checks = [json.loads(p.read_text()) for p in (work / "checks").glob("*.json")]
    assert len(checks) == 4
    assert not any(check["problems"] for check in checks)  # torch with the gains that were read
    assert not list((work / "tune").iterdir())


@pytest.mark.slow
def test_a_model_whose_norms_the_converter_changes_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Gemma2", hidden_size=128, head_dim=32, intermediate_size=256)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match="no norm of this model stands in its GGUF"):
        api.export(tmp_path / "recipe.yaml", tmp_path / "out", reporter=Reporter(quiet=True))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("form: stock}", "form: stock}, {format: onnx}"))
    with pytest.raises(RecipeError, match="tune is for GGUF exports"):
        load_recipe(path)
    path.write_text(RECIPE.replace("form: stock}", "form: stock}, {format: gguf, type: BF16}"))
    with pytest.raises(RecipeError, match="leave out the export of type BF16"):
        load_recipe(path)
