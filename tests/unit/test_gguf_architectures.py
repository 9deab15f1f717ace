"""Every architecture that the docs list: pairs in llama.cpp compute what torch computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.errors import InputError
from svdexport.export import gguf
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from tests.unit.gguf_models import (
    DEMO_VOCABULARY,
    compress,
    export,
    load,
    make_model,
    save_checkpoint,
    torch_logits,
    work_of,
)
from tests.unit.test_gguf_export import pair_names

TOKENS = np.random.default_rng(0).integers(3, 259, 40)
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
DEMO = {"vocab_size": DEMO_VOCABULARY}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": None}
# model, configuration, factor tensors of a block (A and B)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen3": ("Qwen3", {"head_dim": 16}, 8),
    "gemma2": ("Gemma2", GEMMA, 8),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 6}, 8),
    "phi3": ("Phi3", {}, 8),
    "olmo2": ("Olmo2", DEMO, 8),
    "stablelm": ("StableLm", DEMO, 8),
    # attention and MLP read one norm: one group, two names for its A
    "stablelm-parallel": ("StableLm", {**DEMO, "use_parallel_residual": True}, 8),
    "gpt2": ("GPT2", {**DEMO, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 256}, 8),
    "mixtral": ("Mixtral", {**EXPERTS, "num_local_experts": 4}, 4),
    "qwen2moe": (
        "Qwen2Moe",
        {
            **EXPERTS,
            **DEMO,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
        10,
    ),
}


class HalfGelu(torch.nn.Module):
    """llama.cpp takes GELU from a table of half precision: so does the reference here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh")
        return y.half().float()


def use_half_gelu(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        for attribute in ("act_fn", "act"):
            if "GELU" in type(getattr(module, attribute, None)).__name__:
                setattr(module, attribute, HalfGelu())


def assert_close(path: Path, expected: np.ndarray) -> None:
    runtime = LlamaCppRuntime(path, threads=1, context=64, exact=True)
    found = runtime.logits(TOKENS)
    runtime.close()
    assert np.abs(found - expected).max() < 1e-3 * (expected.max() - expected.min())
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_pairs_compute_what_torch_computes(name: str, tmp_path: Path) -> None:
    model, config, factors = MODELS[name]
    source = make_model(tmp_path / "source", model, **config)
    checkpoint, reference = compress(source, tmp_path / "small", rank=24)
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32")
    # a shared expert's gate and up have no shared name for A: it is written twice, and said so
    assert len(made.notes) == (name in ("qwen2moe", "stablelm-parallel"))
    in_block = [
        tensor for tensor in made.tensors if tensor.startswith("blk.1.") and ".lr_" in tensor
    ]
    assert len(in_block) == factors
    use_half_gelu(reference)
    assert_close(made.path, torch_logits(reference, TOKENS))
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    assert pair_names(opened) <= set(found)
    for key, values in found.items():
        assert np.array_equal(values, opened.tensor(key).numpy()), key


def expert_pairs(source: Path, out: Path, skip: str = "no such name") -> tuple[Path, Path]:
    """Pairs for every expert's three matrices; the checkpoint, and a dense folder with B A."""
    tensors = load_file(source / "model.safetensors")
    low_rank: dict[str, PairSpec] = {}
    dense = {}
    for name in [n for n in tensors if ".experts." in n and skip not in n]:
        linear = name.removesuffix(".weight")
        u, s, vt = torch.linalg.svd(tensors.pop(name), full_matrices=False)
        a, b = s[:32, None] * vt[:32], u[:, :32].contiguous()
        tensors |= {f"{linear}.lr_a.weight": a, f"{linear}.lr_b.weight": b}
        dense[name] = b @ a
        low_rank[linear] = PairSpec(32, linear)
    save_checkpoint(out, Checkpoint.open(source).config, low_rank, tensors)
    twin = shutil.copytree(source, out.with_name("twin"))
    save_file(load_file(source / "model.safetensors") | dense, twin / "model.safetensors")
    return out, twin


def test_experts_are_stacked_pairs(tmp_path: Path) -> None:
    model, config, _ = MODELS["mixtral"]
    source = make_model(tmp_path / "source", model, **config)
    checkpoint, twin = expert_pairs(source, tmp_path / "small")
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32")
    assert made.tensors["blk.0.ffn_gate_exps.lr_a.weight"].shape == (64, 32, 4)
    assert made.tensors["blk.0.ffn_gate_exps.lr_b.weight"].shape == (32, 96, 4)
    assert_close(made.path, torch_logits(load(twin), TOKENS))
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    assert pair_names(opened) <= set(found)
    for key, values in found.items():
        assert np.array_equal(values, opened.tensor(key).numpy()), key


def test_some_experts_only_are_refused(tmp_path: Path) -> None:
    model, config, _ = MODELS["mixtral"]
    source = make_model(tmp_path / "source", model, **config)
    checkpoint, _ = expert_pairs(source, tmp_path / "small", skip=".experts.2.")
    with pytest.raises(InputError, match=r"3 of 4 experts of .* all or none"):
        export(checkpoint, source, tmp_path / "out.gguf", type="F32")


def test_a_weight_that_llama_cpp_cannot_run_as_a_pair_is_refused(tmp_path: Path) -> None:
    model, config, _ = MODELS["qwen2moe"]
    source = make_model(tmp_path / "source", model, **config)
    tensors = load_file(source / "model.safetensors")
    linear = "model.layers.0.mlp.shared_expert_gate"
    weight = tensors.pop(f"{linear}.weight")
    tensors |= {f"{linear}.lr_a.weight": weight, f"{linear}.lr_b.weight": torch.ones(1, 1)}
    config = Checkpoint.open(source).config
    save_checkpoint(tmp_path / "small", config, {linear: PairSpec(1, linear)}, tensors)
    with pytest.raises(InputError, match=r"shared_expert_gate: llama.cpp does not run"):
        export(tmp_path / "small", source, tmp_path / "out.gguf", type="F32")
