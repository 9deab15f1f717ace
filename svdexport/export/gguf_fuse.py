"""Linears with one input as one pair: two products in llama.cpp, where each had a B of its own.

llama.cpp's loader asks for a fused ``attn_qkv.weight`` before it asks for q, k and v, in every
architecture listed here, so a pair under that stem needs no more of the runtime than any other.
It knows no fused weight of gate and up: there the runtime gives each of the two its rows of B.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from svdexport.checkpoint import Checkpoint
from svdexport.export.gguf_layout import SHARED_STEMS, PairPlace

# each is tested against torch (tests/unit/test_gguf_architectures.py)
ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen2moe", "qwen3", "gemma2", "gemma3", "olmo2", "stablelm"}
)


def fuse(
    places: list[PairPlace], checkpoint: Checkpoint, tensors: Container[str]
) -> list[PairPlace]:
    """The same places, with one B where all linears of an input share an A; order and linears stay.

    Args:
        places: as ``pair_places`` names them.
        checkpoint: gives the number of rows of each B.
        tensors: names of the base. A layer of which only some of q, k, v have a bias is left as it
            is, since llama.cpp adds three or none to a fused product.
    """
    by_b = {place.b: place for place in places}
    fused: dict[str, PairPlace] = {}
    for group, names in SHARED_STEMS.items():
        for first in dict.fromkeys(place.a for place in places):
            stem = first.removesuffix(f"{group}.lr_a.weight")
            members = [by_b.get(f"{stem}{name}.lr_b.weight") for name in names]
            if stem == first or None in members:
                continue
            biases = sum(f"{stem}{name}.bias" in tensors for name in names)
            if group == "attn_qkv" and biases not in (0, len(names)):
                continue
            start = 0
            for member in filter(None, members):
                stop = start + checkpoint.pair(member.linear).out_features
                b, rows = f"{stem}{group}.lr_b.weight", slice(start, stop)
                fused[member.linear] = replace(member, b=b, rows=rows)
                start = stop
    return [fused.get(place.linear, place) for place in places]
