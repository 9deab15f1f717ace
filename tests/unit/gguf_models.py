"""Tiny random models of real structure with a tokenizer that llama.cpp's converter takes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from svdexport.checkpoint import Checkpoint, PairSpec, low_rank_config
from svdexport.export import gguf
from svdexport.export.base import Exported, ExportRequest
from svdexport.models.blocks import discover
from svdexport.recipe import GgufExport

VOCABULARY = 384
DEMO_VOCABULARY = 49152
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = "the a model of language writes what it reads and reads what it writes in small letters "


def sentencepiece_model() -> bytes:
    """A small sentencepiece tokenizer; the converter needs no known pre-tokenizer for one."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, WORDS.upper()] * 20),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def make_model(folder: Path, model: str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a random model of a transformers class (``Llama``) with a tokenizer.

    That is a sentencepiece one, or the demo model's where ``vocab_size`` is the demo model's.
    """
    import transformers

    torch.manual_seed(0)
    settings = {**SMALL, **config}
    config_class = {"Gemma3": "Gemma3Text"}.get(model, model)
    model_class = "GPT2LMHeadModel" if model == "GPT2" else f"{model}ForCausalLM"
    made = getattr(transformers, model_class)(
        getattr(transformers, f"{config_class}Config")(**settings)
    )
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1:  # norms and biases: not all ones and zeros
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.1)
    made.to(dtype).save_pretrained(folder)
    if settings["vocab_size"] == DEMO_VOCABULARY:
        demo_tokenizer(folder)
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def compress(
    folder: Path, out: Path, rank: int, group: bool = True, only: str = ""
) -> tuple[Path, torch.nn.Module]:
    """Truncated SVD of every linear (or of those with ``only`` in the name), saved as a checkpoint.

    Returns the folder and the torch model with B A in the place of each weight.
    """
    model = load(folder)
    source = Checkpoint.open(folder)
    low_rank: dict[str, PairSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    for found in discover(model).groups:
        linears = [
            member.name
            for member in found.members
            if only in member.name and min(member.out_features, member.in_features) >= rank
        ]
        for names in [linears] if group else [[name] for name in linears]:
            if names:
                tensors |= _factorise(model, names, rank)
                low_rank |= {name: PairSpec(rank, names[0]) for name in names}
    dense = {
        n: source.tensor(n) for n in source.names() if n.removesuffix(".weight") not in low_rank
    }
    save_checkpoint(out, source.config, low_rank, dense | tensors)
    return out, model


def save_checkpoint(
    out: Path,
    config: dict[str, Any],
    low_rank: dict[str, PairSpec],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Write a compressed checkpoint folder."""
    out.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    settings = {**config, "quantization_config": low_rank_config(low_rank)}
    (out / "config.json").write_text(json.dumps(settings))


def _factorise(model: torch.nn.Module, names: list[str], rank: int) -> dict[str, torch.Tensor]:
    modules = [model.get_submodule(name) for name in names]
    conv = [type(module).__name__ == "Conv1D" for module in modules]
    weights = [m.weight.data.T if c else m.weight.data for m, c in zip(modules, conv, strict=True)]
    u, s, vt = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    a = vt[:rank] * s[:rank].sqrt()[:, None]
    parts = (u[:, :rank] * s[:rank].sqrt()).split([w.shape[0] for w in weights])
    tensors = {f"{names[0]}.lr_a.weight": a.contiguous()}
    for name, module, transposed, b in zip(names, modules, conv, parts, strict=True):
        tensors[f"{name}.lr_b.weight"] = b.contiguous().clone()
        dense = b @ a
        module.weight.data = (dense.T if transposed else dense).contiguous()
    return tensors


def export(
    checkpoint: Path,
    source: Path,
    out: Path,
    source_gguf: Path | None = None,
    **spec: Any,
) -> Exported:
    request = ExportRequest(
        Checkpoint.open(checkpoint), source, source_gguf, out, work_of(source), GgufExport(**spec)
    )
    return gguf.export(request)


def work_of(source: Path) -> Path:
    """The scratch folder of a model: its base GGUF is made once."""
    return source.with_name(f"{source.name}-work")


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return logits


def demo_tokenizer(folder: Path) -> None:
    """Put the demo model's tokenizer (49,152 tokens) into a folder; skip where it is missing."""
    import pytest

    from tools.fetch_demo_model import cache_root

    found = sorted((cache_root() / "models").glob("SmolLM2*/tokenizer.json"))
    if not found:
        pytest.skip("the demo model's tokenizer is needed: make setup fetches it")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(found[0].parent / name, folder / name)
