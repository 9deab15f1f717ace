"""Folders that leave out the base model's prefix give what the same folders with it give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdexport import api
from svdexport.checkpoint import Checkpoint, parameter_names
from svdexport.export import ExportRequest, exporter
from svdexport.models.loader import load_model
from svdexport.pipeline.artifacts import load_values
from svdexport.recipe import OnnxExport
from tests.unit import gguf_models
from tests.unit.test_encoder import make_encoder
from tests.unit.tiny_checkpoints import make_model

PREFIXES = {"llama": "model.", "gpt2": "transformer.", "mixtral": "model."}
PARTS = {"llama": "self_attn.o_proj", "gpt2": "mlp.c_proj"}
TOKENS = np.random.default_rng(0).integers(3, 259, 24)
RECIPE = """\
schema: 1
model: {{path: {source}}}
calibration: {{source: file, file: {text}, samples: 4, length: 32, batch: 4}}
compress: {{method: svd_llm, budget: {{param_ratio: 0.8}}, rank_multiple: 8, sequential: true,
  ignore: ["re:layers\\\\.1\\\\.mlp"]}}
export: [{{format: checkpoint}}]
evaluate: {{text: {text}, context: 24, windows: 2}}
"""
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20


def without_prefix(folder: Path, prefix: str) -> Path:
    """A copy of a folder as the Hub has GPT-2 and Qwen3-Embedding."""
    bare = folder.with_name("bare")
    shutil.copytree(folder, bare)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    return bare


@pytest.mark.parametrize("family", list(PREFIXES))
def test_tensors_have_the_names_of_the_models_parameters(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", family)
    meant = Checkpoint.open(tmp_path / "m")
    found = Checkpoint.open(without_prefix(tmp_path / "m", PREFIXES[family]))
    assert not meant.stored and found.names() == meant.names()
    assert all(torch.equal(found.tensor(name), meant.tensor(name)) for name in meant.names())
    values = [(name, np.full(p.shape, 0.5, np.float32)) for name, p in model.named_parameters()]
    if family != "mixtral":  # the values of a file, by the names of the folder's tensors
        assert {name for name, _ in values} >= set(found.names())
        loaded = load_model(found.path)
        load_values(loaded, values)
        assert all((parameter == 0.5).all() for parameter in loaded.parameters())


def test_a_prefix_that_an_encoder_does_not_know_is_left_out(tmp_path: Path) -> None:
    made = make_encoder(tmp_path)
    stored = {f"bert.{name}": value for name, value in made.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint.open(tmp_path)
    for name, parameter in load_model(tmp_path).named_parameters():
        assert torch.equal(found.tensor(name), parameter)


def test_names_of_a_model_that_transformers_does_not_know_stay() -> None:
    for architectures in ([], ["Unknown"], ["GPT2LMHeadModel"], ["pipeline"], [3], 3, {}):
        assert parameter_names({"architectures": architectures, "n_layer": "x"}, ["h.0.w"]) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_checkpoint_is_the_same(family: str, tmp_path: Path) -> None:
    """Every pair is in the place of its weight, and what was fitted beside the pairs is kept."""
    make_model(tmp_path / "m", family)
    (tmp_path / "text.txt").write_text(TEXT)
    made = []
    for source in (tmp_path / "m", without_prefix(tmp_path / "m", PREFIXES[family])):
        recipe = tmp_path / f"{source.name}.yaml"
        recipe.write_text(RECIPE.format(source=source, text=tmp_path / "text.txt"))
        made.append(api.compress(recipe, tmp_path / f"out-{source.name}"))
    meant, found = map(Checkpoint.open, made)
    assert meant.low_rank and found.low_rank == meant.low_rank
    assert found.files.keys() == meant.files.keys()
    assert not {f"{name}.weight" for name in found.low_rank} & found.files.keys()
    assert all(torch.equal(found.tensor(name), meant.tensor(name)) for name in meant.names())
    source = Checkpoint.open(tmp_path / "m")
    dense = [name for name in found.names() if source.has(name)]
    changed = [n for n in dense if not torch.equal(found.tensor(n), source.tensor(n).float())]
    assert bool(changed) == (family == "llama")  # GPT-2's Conv1D are not fitted
    logits = [gguf_models.torch_logits(load_model(folder), TOKENS) for folder in made]
    assert np.array_equal(*logits)


def pairs_of(source: Path, family: str, out: Path) -> Path:
    """A checkpoint with pairs in both blocks, made from a folder with the prefix."""
    folder, _ = gguf_models.compress(source, out, rank=16, only=PARTS[family])
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_onnx_files_hold_the_same(family: str, tmp_path: Path) -> None:
    make_model(tmp_path / "m", family)
    bare = without_prefix(tmp_path / "m", PREFIXES[family])
    spec = OnnxExport(precision="fp32")
    made = []
    for source in (tmp_path / "m", bare):
        opened, out = Checkpoint.open(source), tmp_path / f"{source.name}-onnx"
        made.append(exporter("onnx").export(ExportRequest(opened, source, None, out, out, spec)))
    assert made[0].tensors == made[1].tensors


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gguf_files_hold_the_same(family: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    if family == "gpt2":
        config = {"vocab_size": gguf_models.DEMO_VOCABULARY, "n_ctx": 256}
    source = gguf_models.make_model(
        tmp_path / "m", {"llama": "Llama", "gpt2": "GPT2"}[family], **config
    )
    bare = without_prefix(source, PREFIXES[family])
    pairs = pairs_of(source, family, tmp_path / "pairs")
    one = gguf_models.export(pairs, source, tmp_path / "pairs.gguf")
    other = gguf_models.export(pairs, bare, tmp_path / "bare-pairs.gguf")
    assert one.tensors == other.tensors and any(".lr_a." in name for name in one.tensors)
    one = gguf_models.export(source, source, tmp_path / "dense.gguf")
    other = gguf_models.export(bare, bare, tmp_path / "bare-dense.gguf")
    assert one.tensors == other.tensors
    opened, work = Checkpoint.open(bare), gguf_models.work_of(bare)
    values = dict(exporter("gguf").read_back(other.path, opened, bare, None, work))
    loaded = load_model(bare)
    load_values(loaded, values.items())
    for name, value in values.items():
        assert np.array_equal(loaded.get_parameter(name).numpy(), value)
