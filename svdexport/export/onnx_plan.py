"""What an ONNX export is asked for, and what a build wrote besides the graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_onnx import BLOCK_SIZES, NBitsGrid
from svdexport.packed import PackedFolder

FAMILIES = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
}
"""Architectures whose graphs were compared with torch, and their class in the builder."""

ROPE_TYPES = ("default", "llama3")
"""Rotary embeddings that the builder computes as transformers does."""

ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    *("relu", "relu2"),
)
"""Activations that the builder has an operator for."""

_HEAD_STEP = 16
"""onnxruntime's GroupQueryAttention rotates heads whose size is a multiple of this."""

Row = tuple[str, int]
"""A tensor of the checkpoint and how many output rows of an initialiser it owns, in order."""


@dataclass(frozen=True)
class BuildPlan:
    """What the emitter needs to know.

    Attributes:
        checkpoint: weights.
        source: Hugging Face folder of the original model: config and tokenizer.
        grid: grid of the linears; None for float32.
        head_grid: grid of the LM head; None for float32.
        half: everything in float16, logits and cache too, for WebGPU; the grids are then None.
        standard: ONNX's own operators alone.
        packed: weights that were quantised before.
        latent: cache A x where v is a pair of small rank.
        trusted: code in ``source`` may run.
    """

    checkpoint: Checkpoint
    source: Path
    grid: NBitsGrid | None
    head_grid: NBitsGrid | None
    half: bool = False
    standard: bool = False
    packed: PackedFolder | None = None
    latent: bool = False
    trusted: bool = False


@dataclass
class Emission:
    """What a build wrote besides the graph.

    Attributes:
        rows: initialiser that holds linears -> the checkpoint's tensors it is made of, in order.
        grids: weight initialiser -> its grid, where it is quantised.
        columns: weight initialiser -> the numbers in a row, where it is quantised.
        transposed: dense tensors that the checkpoint stores as (inputs, outputs).
        shared_embedding: the LM head's weight also serves the embedding.
        latent_layers: layer -> rank, where the cache holds A x in place of the values.
        cache_bytes: of a token in the cache, with the values as the model has them and as written.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    grids: dict[str, NBitsGrid] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    shared_embedding: bool = False
    latent_layers: dict[int, int] = field(default_factory=dict)
    cache_bytes: tuple[int, int] = (0, 0)


def why_not(config: Any, *, latent: bool = False, standard: bool = False) -> str | None:
    """Why the builder's graph would not be exact for a model or not what was asked for; or None."""
    if standard:
        return "standard operators were asked for"
    if latent:
        return "a latent cache was asked for"
    names = getattr(config, "architectures", None) or ["a model of no named architecture"]
    if names[0] not in FAMILIES:
        return f"the onnxruntime-genai builder's graph for {names[0]} was not shown to be exact"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"the onnxruntime-genai builder does not do rotary embeddings of type {kind} exactly"
    if rope.get("partial_rotary_factor", 1) != 1:
        return "the onnxruntime-genai builder does not rotate part of a head"
    if config.hidden_act not in ACTIVATIONS:
        return f"the onnxruntime-genai builder does not know the activation {config.hidden_act}"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % _HEAD_STEP:
        return f"GroupQueryAttention has no heads of {width}, only of multiples of {_HEAD_STEP}"
    return None


def table_grid(grid: NBitsGrid, columns: int) -> NBitsGrid | None:
    """The grid of a traced graph's embedding, whose rows are also read one by one.

    ``grid`` in the widest blocks, up to its own, that rows of ``columns`` fill: nothing that reads
    single rows takes padded ones. None, for float, where no block does.
    """
    whole = (b for b in BLOCK_SIZES if b <= grid.block_size and columns % b == 0)
    widest = max(whole, default=None)
    return None if widest is None else replace(grid, block_size=widest)
