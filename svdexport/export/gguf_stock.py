"""Forms of an export that an unchanged llama.cpp runs.

``stock``: the reconstructed dense weights B A. ``stock_lora``: the remainder W - B A, quantised, in
place of W, and the pairs as a LoRA adapter in a second file beside it, so that
y = quantised(W - B A) x + B (A x).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.export.gguf_layout import PairPlace, floats
from svdexport.export.gguf_types import Types, held
from svdexport.export.gguf_write import Planned, string, text
from svdexport.runtimes.gguf_file import F32, GgufFile


def dense_weights(
    checkpoint: Checkpoint, places: list[PairPlace]
) -> dict[str, Callable[[], np.ndarray]]:
    """File tensor -> rows of B A, for every pair."""
    return {place.match.tensor: _product(checkpoint, place) for place in places}


def remainders(
    checkpoint: Checkpoint, places: list[PairPlace], base: GgufFile
) -> dict[str, Callable[[], np.ndarray]]:
    """File tensor -> rows of W - B A, for every pair."""

    def remainder(place: PairPlace) -> Callable[[], np.ndarray]:
        product = _product(checkpoint, place)
        return lambda: base.rows(place.match.tensor) - product()

    return {place.match.tensor: remainder(place) for place in places}


def adapter(
    checkpoint: Checkpoint, places: list[PairPlace], base: GgufFile, types: Types
) -> tuple[list[bytes], list[Planned]]:
    """Metadata and tensors of a LoRA adapter of the pairs; a shared A is repeated for each member.

    Its alpha is 0, for which llama.cpp leaves B A as it is whatever the rank.
    """
    tensors = []
    for place in places:
        a, b = f"{place.match.tensor}.lora_a", f"{place.match.tensor}.lora_b"
        rank = checkpoint.low_rank[place.linear].rank
        n_in, n_out = base.tensors[place.match.tensor].ne[:2]
        tensors += [
            Planned(a, (n_in, rank), held(types.a, n_in), _first(checkpoint, place)),
            Planned(b, (rank, n_out), held(types.b, rank), _second(checkpoint, place)),
        ]
    metadata = [
        string("general.architecture", base.architecture),
        string("general.type", "adapter"),
        string("adapter.type", "lora"),
        text("adapter.lora.alpha") + struct.pack("<If", F32, 0.0),
    ]
    return metadata, tensors


def _product(checkpoint: Checkpoint, place: PairPlace) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        pair = checkpoint.pair(place.linear)
        product: np.ndarray = (pair.b.float() @ pair.a.float()).numpy()
        return place.match.to_file(product)

    return values


def _first(checkpoint: Checkpoint, place: PairPlace) -> Callable[[], np.ndarray]:
    return lambda: floats(checkpoint, f"{place.leader}.lr_a.weight")


def _second(checkpoint: Checkpoint, place: PairPlace) -> Callable[[], np.ndarray]:
    return lambda: place.match.to_file(floats(checkpoint, f"{place.linear}.lr_b.weight"))
