"""GGUF export: the written file computes what the torch model with the same weights computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError
from svdexport.export import gguf
from svdexport.export.gguf_plan import make_plan
from svdexport.runtimes.ggml import supports_low_rank
from svdexport.runtimes.inspect_gguf import inspect
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from tests.unit.gguf_models import (
    VOCABULARY,
    compress,
    export,
    load,
    make_model,
    torch_logits,
    work_of,
)

TOKENS = np.random.default_rng(0).integers(3, 259, 40)
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "llama-scaled-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}

needs_pairs = pytest.mark.skipif(
    not supports_low_rank(), reason="the installed llama.cpp does not know low-rank pairs"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a model of MODELS, made once with its base GGUF."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        model, config = MODELS[name]
        folder = root / name
        return folder if folder.exists() else make_model(folder, model, **config)

    return make


@pytest.fixture(scope="module")
def llama(sources: Callable[[str], Path]) -> Path:
    return sources("llama")


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-3) -> None:
    """Within ``tolerance`` of the logits' spread, and the same first choice everywhere."""
    assert np.abs(found - expected).max() < tolerance * (expected.max() - expected.min())
    assert (found.argmax(1) == expected.argmax(1)).all()


def pair_names(checkpoint: Checkpoint) -> set[str]:
    """Names of the tensors that hold a checkpoint's pairs."""
    second = {f"{linear}.lr_b.weight" for linear in checkpoint.low_rank}
    return second | {f"{leader}.lr_a.weight" for leader in checkpoint.groups}


@needs_pairs
@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_pairs_compute_what_torch_computes(
    name: str, group: bool, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources(name)
    checkpoint, reference = compress(source, tmp_path / "small", rank=24, group=group)
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32")
    for stem in ("attn_qkv.lr_a", "attn_qkv.lr_b", "ffn_gate_up.lr_a", "ffn_gate_up.lr_b"):
        assert sum(f".{stem}." in tensor for tensor in made.tensors) == (2 if group else 0)
    assert any(".ffn_up.lr_b" in tensor for tensor in made.tensors) != group
    runtime = LlamaCppRuntime(made.path, threads=1, context=64, exact=True)
    assert runtime.vocab_size == VOCABULARY
    assert_close(runtime.logits(TOKENS), torch_logits(reference, TOKENS))
    runtime.close()
    assert gguf.check_round_trip(made.path, made.tensors) == []


@needs_pairs
@pytest.mark.parametrize("name", MODELS)
def test_pairs_apart_share_their_a(
    name: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources(name)
    checkpoint, reference = compress(source, tmp_path / "small", rank=24)
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32", fuse=False)
    assert sum(".attn_qkv.lr_a" in tensor for tensor in made.tensors) == 2
    assert sum(re.search(r"attn_[qkv]\.lr_b", tensor) is not None for tensor in made.tensors) == 6
    assert sum(re.search(r"ffn_(gate|up)\.lr_b", name) is not None for name in made.tensors) == 4
    linears = {entry["name"]: entry for entry in inspect(made.path)["linears"]}
    assert {linears[stem]["form"] for stem in ("attn_q", "ffn_gate", "ffn_up")} == {"shared pair"}
    assert linears["ffn_down"]["form"] == "pair" and linears["ffn_up"]["rank"] == 24
    runtime = LlamaCppRuntime(made.path, threads=1, context=64, exact=True)
    assert_close(runtime.logits(TOKENS), torch_logits(reference, TOKENS))
    runtime.close()
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    assert set(found) == {name for name in opened.names() if not name.endswith(".bias")}
    for key, values in found.items():
        assert np.array_equal(values, opened.tensor(key).numpy()), key


def test_dense_twin_computes_what_torch_computes(llama: Path, tmp_path: Path) -> None:
    made = export(llama, llama, tmp_path / "out.gguf", type="F32")
    runtime = LlamaCppRuntime(made.path, threads=1, context=64, exact=True)
    assert_close(runtime.logits(TOKENS), torch_logits(load(llama), TOKENS))
    runtime.close()
    assert not any(".lr_" in tensor for tensor in made.tensors)


def test_read_back_gives_the_checkpoints_values(llama: Path, tmp_path: Path) -> None:
    checkpoint, _ = compress(llama, tmp_path / "small", rank=32)
    made = export(checkpoint, llama, tmp_path / "out.gguf", type="F32")
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, llama, None, work_of(llama)))
    assert set(found) == set(opened.names())  # norms too
    for name, values in found.items():
        assert np.array_equal(values, opened.tensor(name).numpy()), name


def test_rows_of_b_follow_the_converters_permutation(llama: Path, tmp_path: Path) -> None:
    checkpoint, _ = compress(llama, tmp_path / "small", rank=32)
    plan = make_plan(Checkpoint.open(checkpoint), llama, None, work_of(llama))
    orders = {name: match.order for name, match in plan.matches.items()}
    q = orders["model.layers.0.self_attn.q_proj.weight"]
    k = orders["model.layers.1.self_attn.k_proj.weight"]
    # Llama: per head of 16 rows, the halves are interleaved (0, 8, 1, 9, ...)
    head = np.stack([np.arange(8), np.arange(8) + 8], axis=1).ravel()
    assert q is not None and np.array_equal(q, np.concatenate([head + 16 * h for h in range(4)]))
    assert k is not None and np.array_equal(k, np.concatenate([head + 16 * h for h in range(2)]))
    assert orders["model.layers.0.self_attn.v_proj.weight"] is None


def test_a_weight_that_is_not_in_the_base_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = export(llama, llama, tmp_path / "base.gguf", type="F16")
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 0.01
    save_file(tensors, other / "model.safetensors")
    checkpoint, _ = compress(other, tmp_path / "small", rank=32, only="up_proj")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj|layers\.1\.mlp\.up_proj"):
        export(checkpoint, other, tmp_path / "out.gguf", source_gguf=base.path, type="F16")


def test_a_changed_dense_tensor_is_written(sources: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = sources("qwen2")
    checkpoint, _ = compress(source, tmp_path / "small", rank=24, only="mlp")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.5
    save_file(tensors, checkpoint / "model.safetensors")
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32")
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(found[name], tensors[name].numpy())


def test_a_changed_norm_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint, _ = compress(llama, tmp_path / "small", rank=24)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] += 1
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.input_layernorm\.weight: differs"):
        export(checkpoint, llama, tmp_path / "out.gguf", type="F16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_sources_are_held_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "Llama", dtype)
    checkpoint, _ = compress(source, tmp_path / "small", rank=24, only="mlp")
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32")
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    assert set(found) == set(opened.names())
    for name, values in found.items():
        assert np.array_equal(values, opened.tensor(name).float().numpy()), name


def test_the_converters_refusal_is_one_line(llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(InputError, match=r"converter refuses this model: .*NoSuchModel") as caught:
        export(other, other, tmp_path / "out.gguf", type="F16")
    assert "\n" not in str(caught.value)
    assert not list(work_of(other).glob("*.part"))
