"""Checkpoints over 2 GB: several files and an index hold what one file would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svdexport.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from svdexport.errors import InputError
from svdexport.export import checkpoint as checkpoint_module
from svdexport.export.base import Exported, ExportRequest
from svdexport.export.checkpoint import check_round_trip, export
from svdexport.models.loader import load_model
from svdexport.recipe import CheckpointExport
from svdexport.safety import check_model_folder
from tests.unit.tiny_checkpoints import compress, make_model

GROUPS = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
LIMIT = 20_000  # bytes: less than the embedding, more than most other tensors


def written(source: Path, checkpoint: Checkpoint, out: Path) -> Exported:
    spec = CheckpointExport(dtype="float32")
    return export(ExportRequest(checkpoint, source, None, out, out.parent, spec))


@pytest.mark.parametrize("pairs", [False, True])
def test_shards_hold_what_one_file_holds(
    pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    make_model(source, "llama")
    dense = Checkpoint.open(source)
    checkpoint = compress(source, tmp_path / "low", GROUPS) if pairs else dense
    whole = written(source, checkpoint, tmp_path / "whole")
    assert [path.name for path in whole.path.glob("*.safetensors*")] == [SINGLE_NAME]
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", LIMIT)
    parts = written(source, checkpoint, tmp_path / "parts")

    files = sorted(path.name for path in parts.path.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert not list(parts.path.glob("shard-*"))
    assert parts.bytes == sum((parts.path / file).stat().st_size for file in files)
    index = json.loads((parts.path / INDEX_NAME).read_text())
    together = {}
    for file in files:
        held = load_file(parts.path / file)
        assert set(held) == {name for name, there in index["weight_map"].items() if there == file}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= LIMIT
        together |= held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in together.values())
    one = load_file(whole.path / SINGLE_NAME)
    assert set(together) == set(one)
    assert all(torch.equal(tensor, one[name]) for name, tensor in together.items())

    assert parts.tensors == whole.tensors
    assert check_round_trip(parts.path, parts.tensors) == []
    check_model_folder(parts.path)
    assert Checkpoint.open(parts.path).names() == Checkpoint.open(whole.path).names()
    tokens = torch.arange(3, 35)[None]
    logits = [
        model(tokens).logits
        for model in (
            load_model(whole.path),
            load_model(parts.path),
            AutoModelForCausalLM.from_pretrained(parts.path, dtype=torch.float32).eval(),
        )
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_changed_or_missing_shard_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    make_model(source, "llama")
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", LIMIT)
    made = written(source, Checkpoint.open(source), tmp_path / "parts")
    last = sorted(made.path.glob("*.safetensors"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    index = json.loads((made.path / INDEX_NAME).read_text())
    held = {name for name, file in index["weight_map"].items() if file == last.name}
    (problem,) = check_round_trip(made.path, made.tensors)
    name, _, what = problem.partition(": ")
    assert name in held and what == "differs from what was meant"
    last.unlink()
    with pytest.raises(InputError, match=last.name):
        check_model_folder(made.path)
