"""Quality of a sentence encoder: its embeddings beside the dense model's, and the order of their
similarities, which is what retrieval lives on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from svdexport.core.measures import Embeddings
from svdexport.errors import ArtifactError
from svdexport.verify.bootstrap import spread

Array = NDArray[np.floating]
Embed = Callable[[NDArray[np.int64]], Array]
"""Tokens (B, T), none of them padding -> embeddings (B, width) of length 1."""

MIN_TEXTS = 8
_BATCH = 16
_DRAWS = 400  # each sorts all pairs of texts
_LOW = 0.05


def embed_all(embed: Embed, texts: NDArray[np.int64], where: str) -> Array:
    """Embeddings (N, width) of texts (N, T). Raises ArtifactError where one is not finite."""
    parts = [embed(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    found = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(found).all():
        raise ArtifactError(f"{where}: an embedding is not finite")
    return found


def compare(meant: Array, found: Array, tokens: int, seed: int) -> Embeddings:
    """Embeddings (N, width) of length 1 against those of the dense model, of ``tokens`` each."""
    count = len(meant)
    cosine = (meant * found).sum(axis=1)
    figures: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "mean_cosine": lambda i: float(cosine[i].mean()),
        "low_cosine": lambda i: float(np.quantile(cosine[i], _LOW)),
    }
    if count >= MIN_TEXTS:
        similar = (meant @ meant.T, found @ found.T)
        figures["rank_correlation"] = lambda i: _of_pairs(similar, i)
    every = np.arange(count)
    values = {name: figure(every) for name, figure in figures.items()}
    spreads = {n: spread(count, f, seed, _DRAWS) for n, f in figures.items()} if count > 1 else {}
    return Embeddings(
        values["mean_cosine"],
        values["low_cosine"],
        values.get("rank_correlation"),
        count,
        tokens,
        spreads,
    )


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two vectors; ties take the order they stand in."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _of_pairs(similar: tuple[Array, Array], texts: NDArray[np.int64]) -> float:
    """Over pairs of different texts; a resample may hold a text twice."""
    rows, columns = np.triu_indices(texts.size, 1)
    first, second = texts[rows], texts[columns]
    apart = first != second
    one, other = (matrix[first[apart], second[apart]] for matrix in similar)
    return spearman(one, other)


def _ranks(values: Array) -> Array:
    order = np.empty(values.size)
    order[values.argsort(kind="stable")] = np.arange(values.size)
    return order
