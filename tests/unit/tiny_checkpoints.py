"""Tiny random decoders and compressed checkpoints of them, for the export tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from svdexport.checkpoint import Checkpoint, PairSpec, low_rank_config

VOCAB = 320
HIDDEN = 64
INNER = 128

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-bias": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
}

GENERAL: dict[str, dict[str, Any]] = {
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2},
    "opt": {"model_type": "opt", "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
    "opt-projected": {
        "model_type": "opt",
        "ffn_dim": INNER,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 128},
    "gpt-neox": {"model_type": "gpt_neox"},
    "falcon": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "alibi": False,
    },
    "falcon, one key": {"model_type": "falcon", "multi_query": True, "alibi": False},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": INNER,
    },
}
"""Families that the onnxruntime-genai builder does not do exactly."""

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "bert": "encoder.layer",
}
"""Where the blocks stand, if not in ``model.layers``."""


def make_model(folder: Path, family: str, **changes: Any) -> torch.nn.Module:
    """Save a random two-layer model with a byte-level tokenizer; gives it in float32."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **(FAMILIES | GENERAL)[family],
        **changes,
    }
    torch.manual_seed(7)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({symbol: index + 3 for index, symbol in enumerate(alphabet)})
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def compress(
    source: Path, out: Path, groups: list[list[str]], rank: int = 32, noise: float = 0.0
) -> Checkpoint:
    """Truncate the given groups of linears by an SVD of their stack; every layer alike.

    ``groups`` hold names within a layer such as ``self_attn.q_proj``; the first is the leader.
    """
    dense = Checkpoint.open(source)
    tensors = {name: tensor.float() for name, tensor in dense.iter_tensors()}
    low_rank: dict[str, PairSpec] = {}
    conv = dense.config["model_type"] == "gpt2"
    blocks = BLOCKS.get(dense.config["model_type"], "model.layers")
    for layer in range(2):
        for group in groups:
            if group == ["lm_head"] and layer:
                continue
            members = group if group == ["lm_head"] else [f"{blocks}.{layer}.{n}" for n in group]
            weights = [tensors.pop(f"{member}.weight") for member in members]
            weights = [weight.T if conv else weight for weight in weights]
            u, s, vh = torch.linalg.svd(torch.cat(weights), full_matrices=False)
            b = u[:, :rank] * s[:rank].sqrt()
            tensors[f"{members[0]}.lr_a.weight"] = s[:rank, None].sqrt() * vh[:rank]
            for member, part in zip(members, b.split([w.shape[0] for w in weights]), strict=True):
                tensors[f"{member}.lr_b.weight"] = part
                low_rank[member] = PairSpec(rank, members[0])
    out.mkdir(parents=True)
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, out / "model.safetensors"
    )
    config = {**dense.config, "quantization_config": low_rank_config(low_rank)}
    (out / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(out)


def load_values(model: torch.nn.Module, checkpoint: Checkpoint, values: dict[str, Any]) -> None:
    """Put (dequantised) checkpoint values into the dense torch model; pairs are multiplied out."""
    got = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in values.items()}

    def value(name: str) -> torch.Tensor:
        return got[name] if name in got else checkpoint.tensor(name).float()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = name.removesuffix(".weight")
            spec = checkpoint.low_rank.get(linear) if name.endswith(".weight") else None
            if spec is None:
                parameter.copy_(value(name))
            else:
                b, a = value(f"{linear}.lr_b.weight"), value(f"{spec.group}.lr_a.weight")
                product = (b.double() @ a.double()).float()
                conv = checkpoint.config["model_type"] == "gpt2"
                parameter.copy_(product.T if conv else product)
