"""The residual form in a GGUF: y = W x + B (A x), a quantised W and the pair of what it loses.

The low-rank contract has the pair's tensors beside the dense one of the same stem; linears that
share A find it under their group's stem, as those without a dense matrix do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from svdexport.export.gguf_layout import SHARED_STEMS, PairPlace, places_of
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_write import Planned
from svdexport.packed import GGUF_PART, PackedFolder
from svdexport.runtimes.gguf_file import GgufFile


def beside_dense(
    packed: PackedFolder, matches: dict[str, Match], base: GgufFile
) -> dict[str, list[Planned]]:
    """Tensor of the base -> the factors that stand behind it, a shared A with each of its linears.

    Raises InputError where a linear's weight was not found in the base.
    """
    groups: dict[str, list[str]] = {}
    for linear, leader in packed.leaders.items():
        groups.setdefault(leader, []).append(linear)
    return {
        place.match.tensor: _factors(packed, place, base) for place in places_of(groups, matches)
    }


def first_factor(stem: str, tensors: Collection[str]) -> str | None:
    """Name of the A of a ``<stem>.lr_b.weight``: its own or its group's; None without a pair."""
    if f"{stem}.lr_b.weight" not in tensors:
        return None
    prefix, _, last = stem.rpartition(".")
    groups = [group for group, members in SHARED_STEMS.items() if last in members]
    names = [f"{stem}.lr_a.weight", *(f"{prefix}.{group}.lr_a.weight" for group in groups)]
    return next((name for name in names if name in tensors), None)


def _factors(packed: PackedFolder, place: PairPlace, base: GgufFile) -> list[Planned]:
    n_in, n_out = base.tensors[place.match.tensor].ne[:2]
    a, b = f"{place.leader}.lr_a.weight", f"{place.linear}.lr_b.weight"
    rank = len(packed.read(a).parts[GGUF_PART])

    def rows(name: str, match: Match | None = None) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            data = packed.read(name).parts[GGUF_PART]
            return data if match is None else match.to_file(data)

        return read

    return [
        Planned(place.a, (n_in, rank), packed.kinds[a], rows(a)),
        Planned(place.b, (rank, n_out), packed.kinds[b], rows(b, place.match)),
    ]
