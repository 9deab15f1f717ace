"""Refinement on a GPU: the CPU's results, the same bytes twice, and the whole stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.models.decoder import Decoder
from svdexport.recipe.refiners import Als, Distill, Lora, SequentialLs
from svdexport.refine import REFINERS, Refined, training
from tests.unit.refine_models import data
from tests.unit.tiny_checkpoints import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

TRAINING: dict[str, Any] = {"steps": 20, "learning_rate": 1e-2, "batch": 4, "patience": 1000}
CONFIGS: dict[str, Any] = {
    "als": Als(iterations=2),
    "sequential_ls": SequentialLs(),
    "distill": Distill(**TRAINING, precision="float32"),
    "distill, linears": Distill(**TRAINING, precision="float32", train="linears"),
    "lora": Lora(**TRAINING, precision="float32", rank=2),
}
Report = Callable[[str, int, int], None]


def refined(scratch: Path, config: Any, device: str, progress: Report = lambda *_: None) -> Refined:
    given = data(scratch, progress=progress, dense_blocks=(1,), gradients=True)

    def on(decoder: Any) -> Decoder:
        return Decoder(decoder.module.to(device), decoder.structure)

    make, student = given.teacher, on(given.student)
    moved = dataclasses.replace(given, student=student, teacher=lambda: on(make()))
    if config.method == "als":  # moments are summed on the CPU, by a dense model that is there
        moved = dataclasses.replace(moved, teacher=make)
    return REFINERS[config.method].refine(moved, config)


def furthest(one: Refined, two: Refined) -> float:
    """The largest difference of a factor in the two, relative to its norm."""
    assert one.tensors.keys() == two.tensors.keys()
    worst = 0.0
    for name, tensor in one.tensors.items():
        other = two.tensors[name]
        assert tensor.device == other.device == torch.device("cpu")
        worst = max(worst, float((tensor - other).norm() / tensor.norm()))
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refiner_finds_what_it_finds_on_a_cpu(name: str, tmp_path: Path) -> None:
    there = refined(tmp_path / "cpu", CONFIGS[name], "cpu")
    here = refined(tmp_path / "gpu", CONFIGS[name], "cuda")
    assert furthest(there, here) < 2e-2
    again = refined(tmp_path / "again", CONFIGS[name], "cuda")
    assert all(torch.equal(again.tensors[n], here.tensors[n]) for n in here.tensors)
    assert again.notes == here.notes


@pytest.mark.parametrize("name", ["distill", "lora"])
def test_bfloat16_and_a_stop_between_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name].model_copy(update={"precision": "auto"})
    expected = refined(tmp_path / "whole", config, "cuda")
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(tmp_path / "stopped", config, "cuda", stop)
    found = refined(tmp_path / "stopped", config, "cuda")
    assert all(torch.equal(found.tensors[n], expected.tensors[n]) for n in expected.tensors)
    assert found.notes == expected.notes


RECIPE = """\
schema: 1
model: {path: m}
calibration: {samples: 10, length: 32}
compress: {budget: {param_ratio: 0.6}, rank_multiple: 8}
refine:
  - {method: als, iterations: 1}
  - {method: sequential_ls}
  - {method: lora, steps: 4, batch: 2, rank: 2}
  - {method: distill, steps: 6, batch: 2, samples: 12}
export: [{format: checkpoint}]
"""


@pytest.mark.parametrize("family", ["llama-tied", "phi3"])
def test_the_whole_stage(family: str, tmp_path: Path) -> None:
    make_model(tmp_path / "m", family)
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = Checkpoint.open(api.compress(tmp_path / "r.yaml", tmp_path / "o"))
    work = tmp_path / ".o.work"
    notes = [path.read_text() for path in (work / "refine").glob("*.json")]
    assert len(notes) == 4
    assert all(torch.cuda.get_device_name() in note for note in notes)
    before = Checkpoint.open(work / "checkpoint")
    assert found.names() == before.names()
    for name in found.names():
        assert torch.isfinite(found.tensor(name)).all()
        assert torch.equal(found.tensor(name), before.tensor(name)) != (".lr_" in name)
    again = Checkpoint.open(api.compress(tmp_path / "r.yaml", tmp_path / "again"))
    assert all(torch.equal(found.tensor(n), again.tensor(n)) for n in found.names())
