"""Numerical trouble through the whole compression: finite factors, and the trouble is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdexport import api
from svdexport.errors import InputError
from svdexport.models.loader import load_model
from tests.unit.tiny_checkpoints import make_model

RECIPE = """\
schema: 1
model: {path: m}
calibration: {source: file, file: text.txt, samples: 8, length: 24, batch: 4}
compress: {method: METHOD, budget: {param_ratio: 0.7}, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 24, windows: 2}
speed: {threads: 1}
"""
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q, V = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "m", "llama")
    (tmp_path / "text.txt").write_text(
        "Call me Ishmael. Some years ago, never mind how long. " * 20
    )
    return tmp_path


def change(place: Path, dtype: torch.dtype = torch.float32, **tensors: torch.Tensor) -> None:
    path = place / "m" / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in (load_file(path) | tensors).items()}
    save_file(weights, path, metadata={"format": "pt"})


def compress(place: Path, method: str, *more: str) -> tuple[Path, list[str]]:
    (place / "r.yaml").write_text(RECIPE.replace("METHOD", method))
    folder = api.compress(place / "r.yaml", place / "o", list(more))
    return folder, json.loads((place / ".o.work" / "trouble.json").read_text())


@pytest.mark.parametrize("method", ["svd", "svd_llm", "kfac_svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_16_dead_channels_zeros_and_duplicates(
    place: Path, method: str, dtype: torch.dtype
) -> None:
    weights = load_file(place / "m" / "model.safetensors")
    up, down, q = weights[UP].clone(), weights[DOWN].clone(), weights[Q].clone()
    up[5:20] = 0.0  # the inputs 5 to 19 of down are then always zero
    down[:, 31] = down[:, 30]
    q[:, 7] = q[:, 6]
    change(place, dtype, **{UP: up, DOWN: down, Q: q, V: torch.zeros_like(weights[V])})
    folder, trouble = compress(place, method)
    tensors = load_file(folder / "model.safetensors")
    assert sum("lr_a" in name for name in tensors) >= 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    tokens = torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(load_model(folder)(tokens).logits).all()
    if method != "svd":
        (note,) = [note for note in trouble if "input channels that are zero" in note]
        # behind the zero V, all 64 inputs of the output projection are zero as well
        assert note.startswith("2 linears have")
        assert "up to 64" in note
        assert DOWN.removesuffix(".weight") in note


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd"])
def test_activations_that_overflow_are_refused_by_name(place: Path, method: str) -> None:
    weights = load_file(place / "m" / "model.safetensors")
    change(place, **{UP: weights[UP] * 1e30, DOWN: weights[DOWN] * 1e20})
    with pytest.raises(InputError, match=r"model\.layers\.\d.*overflow on the calibration text"):
        compress(place, method)
