"""Forms of an export that an unchanged llama.cpp runs.

``stock``: the reconstructed dense weights B A. ``stock_lora``: a quantised base, and pairs as a
LoRA adapter in a second file beside it. The base is the remainder W - B A in place of W, so that
y = quantised(W - B A) x + B (A x), or W itself with pairs that were fitted to W - quantised(W).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError
from svdexport.export.gguf_layout import PairPlace, floats
from svdexport.export.gguf_types import Types, held
from svdexport.export.gguf_write import Planned, string, text
from svdexport.packed import GGUF_PART, PackedFolder
from svdexport.runtimes.gguf_file import F32, GgufFile

Rows = Callable[[], np.ndarray]

ADAPTER_PARTS = (".lora_a", ".lora_b")
FITTED = "F32"  # kind of the fitted pairs in their folder


def dense_weights(checkpoint: Checkpoint, stacks: list[list[PairPlace]]) -> dict[str, Rows]:
    """File tensor -> rows of B A, for every pair or stack of experts' pairs."""
    return {places[0].match.tensor: _products(checkpoint, places) for places in stacks}


def remainders(
    checkpoint: Checkpoint, stacks: list[list[PairPlace]], base: GgufFile
) -> dict[str, Rows]:
    """File tensor -> rows of W - B A, for every pair or stack of experts' pairs."""

    def remainder(places: list[PairPlace]) -> Rows:
        products = _products(checkpoint, places)
        return lambda: base.rows(places[0].match.tensor) - products()

    return {places[0].match.tensor: remainder(places) for places in stacks}


def adapter(
    checkpoint: Checkpoint,
    stacks: list[list[PairPlace]],
    base: GgufFile,
    types: Types,
    fitted: PackedFolder | None = None,
) -> tuple[list[bytes], list[Planned]]:
    """Metadata and tensors of a LoRA adapter of the pairs; a shared A is repeated for each member.

    ``fitted``: the pairs that belong to a base of quantised weights, instead of the checkpoint's.
    Raises InputError where one of them is missing. Its alpha is 0, for which llama.cpp leaves B A
    as it is whatever the rank.
    """
    tensors = []
    for places in stacks:
        tensor = places[0].match.tensor
        n_in, n_out, *experts = base.tensors[tensor].ne
        rank = checkpoint.low_rank[places[0].linear].rank
        if fitted is None:
            pairs = [(_first(checkpoint, place), _second(checkpoint, place)) for place in places]
        else:
            pairs = [_fitted(fitted, place) for place in places]
            rank = min(rank, n_in, n_out)
        a, b = (_joined(factors) for factors in zip(*pairs, strict=True))
        tensors += [
            Planned(f"{tensor}.lora_a", (n_in, rank, *experts), held(types.a, n_in), a),
            Planned(f"{tensor}.lora_b", (rank, n_out, *experts), held(types.b, rank), b),
        ]
    metadata = [
        string("general.architecture", base.architecture),
        string("general.type", "adapter"),
        string("adapter.type", "lora"),
        text("adapter.lora.alpha") + struct.pack("<If", F32, 0.0),
    ]
    return metadata, tensors


def _fitted(folder: PackedFolder, place: PairPlace) -> tuple[Rows, Rows]:
    a, b = (f"{place.linear}{part}" for part in ADAPTER_PARTS)
    if a not in folder.files or b not in folder.files:
        raise InputError(
            f"{place.linear}: base: weight needs pairs that are fitted to it, which only the "
            "stages of a run make (svdexport run, svdexport export)"
        )
    return (
        lambda: folder.read(a).parts[GGUF_PART],
        lambda: place.match.to_file(folder.read(b).parts[GGUF_PART]),
    )


def _products(checkpoint: Checkpoint, places: list[PairPlace]) -> Rows:
    def product(place: PairPlace) -> np.ndarray:
        pair = checkpoint.pair(place.linear)
        return place.match.to_file((pair.b.float() @ pair.a.float()).numpy())

    return lambda: np.concatenate([product(place) for place in places])


def _joined(slices: Sequence[Rows]) -> Rows:
    return lambda: np.concatenate([rows() for rows in slices])


def _first(checkpoint: Checkpoint, place: PairPlace) -> Rows:
    return lambda: floats(checkpoint, f"{place.leader}.lr_a.weight")


def _second(checkpoint: Checkpoint, place: PairPlace) -> Rows:
    return lambda: place.match.to_file(floats(checkpoint, f"{place.linear}.lr_b.weight"))
