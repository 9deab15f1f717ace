"""Tiny random models in GGUF files, each linear dense or as a low-rank pair, written by gguf-py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]

LAYERS = 2
WIDTH = 128
HEADS = 4
KV_HEADS = 2
HIDDEN = 192
VOCAB = 96
RANK = 32
EXPERTS = 4

# linears that may share one A, by the stem of the shared tensor
GROUPS = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up": ("ffn_gate", "ffn_up")}


@dataclass(frozen=True)
class TinyModel:
    """What stands in a file: metadata of the architecture, and tensors in numpy's row order."""

    arch: str
    metadata: Mapping[str, int | float]
    tensors: Tensors
    types: Mapping[str, gguf.GGMLQuantizationType] = field(default_factory=dict)

    def with_tensors(self, tensors: Tensors) -> TinyModel:
        return replace(self, tensors=tensors)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.arch)
        writer.add_tokenizer_model("no_vocab")
        for key, value in self.metadata.items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{self.arch}.{key}", value)
        for name, tensor in self.tensors.items():
            kind = self.types.get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
            else:
                writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """A random matrix of rank RANK, as a product whose factors `factors` finds again exactly."""
    *batch, rows, columns = shape
    b = rng.standard_normal((*batch, rows, RANK)) / RANK**0.5
    a = rng.standard_normal((*batch, RANK, columns)) / columns**0.5
    return b @ a


def _metadata(**extra: int | float) -> dict[str, int | float]:
    return {
        "vocab_size": VOCAB,
        "context_length": 512,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": WIDTH // HEADS,
    } | extra


def decoder(
    arch: str = "llama",
    *,
    experts: int = 0,
    biases: bool = False,
    seed: int = 0,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
) -> TinyModel:
    """A decoder with grouped KV heads: `llama`, `qwen2` (with biases), or with experts as Mixtral.

    The linears have rank RANK exactly. Those that may share an A are built from one.
    """
    rng = np.random.default_rng(seed)
    kv_width = width // HEADS * KV_HEADS
    tensors: Tensors = {
        "token_embd.weight": rng.standard_normal((vocab, width)),
        "output_norm.weight": 1 + 0.1 * rng.standard_normal(width),
        "output.weight": _matrix(rng, vocab, width),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        qkv = _matrix(rng, width + 2 * kv_width, width)
        q, k, v = np.split(qkv, (width, width + kv_width))
        linears = {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": _matrix(rng, width, width)}
        if experts:
            linears["ffn_gate_inp"] = rng.standard_normal((experts, width)) / width**0.5
            linears["ffn_gate_exps"] = _matrix(rng, experts, hidden, width)
            linears["ffn_up_exps"] = _matrix(rng, experts, hidden, width)
            linears["ffn_down_exps"] = _matrix(rng, experts, width, hidden)
        else:
            gate, up = np.split(_matrix(rng, 2 * hidden, width), 2)
            linears |= {"ffn_gate": gate, "ffn_up": up, "ffn_down": _matrix(rng, width, hidden)}
        tensors |= {f"{block}{stem}.weight": value for stem, value in linears.items()}
        if biases:
            for stem in ("attn_q", "attn_k", "attn_v"):
                tensors[f"{block}{stem}.bias"] = rng.standard_normal(len(linears[stem]))
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"{block}{norm}.weight"] = 1 + 0.1 * rng.standard_normal(width)
    extra = {
        "vocab_size": vocab,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "rope.dimension_count": width // HEADS,
    }
    if experts:
        extra |= {"expert_count": experts, "expert_used_count": 2}
    return TinyModel(arch, _metadata(**extra), tensors)


def multi_latent(seed: int = 0) -> TinyModel:
    """A tiny PLM: llama.cpp multiplies its q and kv weights directly, not where it knows pairs."""
    rng = np.random.default_rng(seed)
    head, rope, latent = 32, 16, 32
    tensors: Tensors = {
        "token_embd.weight": rng.standard_normal((VOCAB, WIDTH)),
        "output_norm.weight": np.ones(WIDTH),
    }
    for layer in range(LAYERS):
        linears = {
            "attn_q": _matrix(rng, HEADS * head, WIDTH),
            "attn_kv_a_mqa": _matrix(rng, latent + rope, WIDTH),
            "attn_kv_b": _matrix(rng, HEADS * (head - rope + head), latent),
            "attn_output": _matrix(rng, WIDTH, HEADS * head),
            "ffn_up": _matrix(rng, HIDDEN, WIDTH),
            "ffn_down": _matrix(rng, WIDTH, HIDDEN),
        }
        norms = {"attn_norm": WIDTH, "attn_kv_a_norm": latent, "ffn_norm": WIDTH}
        block = f"blk.{layer}."
        tensors |= {f"{block}{stem}.weight": value for stem, value in linears.items()}
        tensors |= {f"{block}{stem}.weight": np.ones(size) for stem, size in norms.items()}
    sizes = {
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.kv_lora_rank": latent,
        "attention.head_count_kv": HEADS,
        "rope.dimension_count": rope,
    }
    return TinyModel("plm", _metadata(**sizes), tensors)


def factors(weight: np.ndarray, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, n_in] and B [n_out, rank] of a weight's best approximation B A; for each expert."""
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[..., :rank])
    return root[..., :, None] * vt[..., :rank, :], u[..., :, :rank] * root[..., None, :]


def linears(tensors: Tensors) -> Iterator[str]:
    """The stems of the linears (`blk.0.attn_q`), the experts' router left out."""
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if tensor.ndim >= 2 and stem.startswith("blk.") and not stem.endswith("ffn_gate_inp"):
            yield stem


def as_pairs(model: TinyModel, *, rank: int = RANK, output: bool = False) -> TinyModel:
    """Every linear (and the head, with `output`) as a pair of its own."""
    tensors = dict(model.tensors)
    for stem in [*linears(model.tensors), *(["output"] if output else [])]:
        a, b = factors(tensors.pop(f"{stem}.weight"), rank)
        tensors |= {f"{stem}.lr_a.weight": a, f"{stem}.lr_b.weight": b}
    return model.with_tensors(tensors)


def as_shared_pairs(model: TinyModel) -> TinyModel:
    """q, k, v and gate, up as pairs that share one A; the other linears as pairs of their own."""
    tensors = dict(model.tensors)
    shared: Tensors = {}
    for layer in range(LAYERS):
        for group, members in GROUPS.items():
            stems = [f"blk.{layer}.{member}" for member in members]
            stacked = [tensors.pop(f"{stem}.weight") for stem in stems]
            a, b = factors(np.concatenate(stacked))
            shared[f"blk.{layer}.{group}.lr_a.weight"] = a
            parts = np.split(b, np.cumsum([len(part) for part in stacked])[:-1])
            for stem, part in zip(stems, parts, strict=True):
                shared[f"{stem}.lr_b.weight"] = part
    return model.with_tensors(as_pairs(model.with_tensors(tensors)).tensors | shared)


def as_fused_pairs(model: TinyModel) -> TinyModel:
    """As ``as_shared_pairs``, but gate and up share their B too: gate's rows, then up's."""
    tensors = dict(as_shared_pairs(model).tensors)
    for layer in range(LAYERS):
        parts = [tensors.pop(f"blk.{layer}.ffn_{name}.lr_b.weight") for name in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_gate_up.lr_b.weight"] = np.concatenate(parts)
    return model.with_tensors(tensors)


def as_residual(model: TinyModel, *, part: int = 8) -> TinyModel:
    """Every linear as W - B A beside the pair B, A of rank `part`: their sum is the dense model."""
    tensors = dict(model.tensors)
    for stem in linears(model.tensors):
        a, b = factors(tensors[f"{stem}.weight"], part)
        tensors |= {
            f"{stem}.weight": tensors[f"{stem}.weight"] - b @ a,
            f"{stem}.lr_a.weight": a,
            f"{stem}.lr_b.weight": b,
        }
    return model.with_tensors(tensors)


def write_lora(
    path: Path, model: TinyModel, deltas: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Path:
    """A LoRA adapter: by weight A [r, n_in] and B [n_out, r]; alpha = r, so it adds just B A."""
    ranks = {len(a) for a, _ in deltas.values()}
    if len(ranks) != 1:
        raise ValueError(f"one rank for all, not {sorted(ranks)}")
    writer = gguf.GGUFWriter(path, model.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ranks.pop()))
    for name, (a, b) in deltas.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, dtype=np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
