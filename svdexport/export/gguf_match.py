"""Which tensor of a GGUF holds which Hugging Face weight: shown by content, not by names.

A converter may rename tensors, transpose them, stack experts and permute output rows (q and k of
the Llama family). It may not change a row: so a weight is found where the rows, each as a 64-bit
BLAKE2b digest of its float32 values, are the same set. The order of the digests gives the
permutation, which then goes on the rows of B. What is not found is not replaced.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from svdexport.runtimes.gguf_file import GgufFile, row_count

CHUNK_ELEMENTS = 1 << 23

Place = tuple[str, int | None]  # tensor of the file, and which slice where it stacks experts


@dataclass(frozen=True)
class Match:
    """Where a Hugging Face matrix stands in the GGUF.

    Attributes:
        tensor: name in the file.
        expert: slice of a stacked (3-d) tensor, or None.
        order: file row i is matrix row ``order[i]``; None is the identity.
        transposed: the Hugging Face tensor is stored (inputs, outputs), as GPT-2's Conv1D.
        sure: False where rows repeat, so that another order would fit as well.
    """

    tensor: str
    expert: int | None
    order: np.ndarray | None
    transposed: bool
    sure: bool = True

    def to_file(self, matrix: np.ndarray) -> np.ndarray:
        """Rows in the file's order."""
        return matrix if self.order is None else matrix[self.order]

    def from_file(self, matrix: np.ndarray) -> np.ndarray:
        """Rows in the checkpoint's order."""
        if self.order is None:
            return matrix
        out = np.empty_like(matrix)
        out[self.order] = matrix
        return out


def row_digests(chunks: Iterable[np.ndarray]) -> np.ndarray:
    """Digest of every float32 row, uint64. Adding 0.0 makes one zero of the two."""
    digests: list[int] = []
    for chunk in chunks:
        rows = np.ascontiguousarray(chunk + np.float32(0.0), dtype=np.float32)
        size = rows.shape[1] * 4
        view = rows.data.cast("B")
        for at in range(0, len(view), size):
            digest = hashlib.blake2b(view[at : at + size], digest_size=8).digest()
            digests.append(int.from_bytes(digest, "little"))
    return np.array(digests, dtype=np.uint64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values after a cast to ``F16`` or ``BF16`` and back."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        import torch

        # Rows of an F32 file are views of its read-only map, which torch takes with a warning.
        cast = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)
        return cast.to(torch.float32).numpy()
    return values


class ContentIndex:
    """Row digests of a GGUF's matrices, to find Hugging Face matrices in it.

    Args:
        file: the base.
        dtype: dtype of the Hugging Face folder where that was made from the base (``F16`` ...):
            the base's values are compared after this cast. None: both hold the same values.
    """

    def __init__(self, file: GgufFile, dtype: str | None = None) -> None:
        self._rows: dict[Place, np.ndarray] = {}
        self._by_key: dict[tuple[int, int, str], list[Place]] = {}
        for name, info in file.tensors.items():
            if len(info.ne) < 2:
                continue
            digests = row_digests(self._chunks(file, name, dtype))
            experts = info.ne[2] if len(info.ne) > 2 else None
            if experts is None:
                self._add((name, None), info.ne[0], digests)
                continue
            for expert, part in enumerate(np.split(digests, experts)):
                self._add((name, expert), info.ne[0], part)

    @staticmethod
    def _chunks(file: GgufFile, name: str, dtype: str | None) -> Iterator[np.ndarray]:
        info = file.tensors[name]
        step = max(1, CHUNK_ELEMENTS // info.ne[0])
        for start in range(0, row_count(info), step):
            values = file.rows(name, start, start + step)
            yield values if dtype is None else rounded(values, dtype)

    def _add(self, place: Place, columns: int, digests: np.ndarray) -> None:
        self._rows[place] = digests
        self._by_key.setdefault(_key(columns, digests), []).append(place)

    def find(self, matrices: Iterable[tuple[str, np.ndarray]]) -> dict[str, Match]:
        """Match named float32 matrices, taken one at a time; those not there are left out."""
        digests: dict[str, np.ndarray] = {}
        found: dict[str, tuple[list[Place], bool]] = {}
        for name, matrix in matrices:
            for transposed in (False, True):
                oriented = matrix.T if transposed else matrix
                rows = row_digests(_row_chunks(oriented))
                places = self._by_key.get(_key(oriented.shape[1], rows))
                if places:
                    digests[name] = rows
                    found[name] = (places, transposed)
                    break
        matches = {}
        for name, place in _assign({name: places for name, (places, _) in found.items()}).items():
            order, sure = _order(digests[name], self._rows[place])
            matches[name] = Match(place[0], place[1], order, found[name][1], sure)
        return self._settle(matches, digests)

    def _settle(
        self, matches: dict[str, Match], digests: dict[str, np.ndarray]
    ) -> dict[str, Match]:
        """Where rows repeat, take the order that the tensor has in another block, if it fits."""
        sure = {_kind(m.tensor): m for m in matches.values() if m.sure}
        settled = {}
        for name, match in matches.items():
            settled[name] = match
            like = sure.get(_kind(match.tensor))
            if match.sure or like is None:
                continue
            there = self._rows[match.tensor, match.expert]
            mine = digests[name]
            if like.order is not None and len(like.order) != len(mine):
                continue
            if np.array_equal(mine if like.order is None else mine[like.order], there):
                settled[name] = replace(match, order=like.order, sure=True)
        return settled


def _row_chunks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step]


def _key(columns: int, digests: np.ndarray) -> tuple[int, int, str]:
    """Rows, columns and a digest of the set of rows."""
    ordered = hashlib.blake2b(np.sort(digests).tobytes(), digest_size=16).hexdigest()
    return len(digests), columns, ordered


def _order(mine: np.ndarray, there: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """The row order that turns ``mine`` into ``there``, and whether it is the only one."""
    sure = len(np.unique(mine)) == len(mine)
    if np.array_equal(mine, there):
        return None, sure
    order = np.empty(len(mine), dtype=np.int64)
    order[np.argsort(there, kind="stable")] = np.argsort(mine, kind="stable")
    return order, sure


def _assign(candidates: dict[str, list[Place]]) -> dict[str, Place]:
    """One place per matrix. Equal matrices (layers that were copied) go by their layer's number."""
    taken: dict[str, Place] = {}
    for name, places in candidates.items():
        if len(places) == 1:
            taken[name] = places[0]
            continue
        same = [place for place in places if _numbers(_place_name(place)) == _numbers(name)]
        if len(same) == 1:
            taken[name] = same[0]
    return taken


def _place_name(place: Place) -> str:
    return place[0] if place[1] is None else f"{place[0]}.{place[1]}"


def _numbers(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"\.(\d+)(?=\.|$)", name)]


def _kind(tensor: str) -> str:
    """A tensor's name without its block's number."""
    return re.sub(r"\.\d+\.", ".N.", tensor)
