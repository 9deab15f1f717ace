"""Weights that the run quantised itself, as tensors of the GGUF: bytes, permuted like the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from svdexport.errors import InputError
from svdexport.export.gguf_layout import PairPlace
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_types import NOT_QUANTISED
from svdexport.packed import GGUF_PART, PackedFolder


@dataclass(frozen=True)
class Ready:
    """A tensor's type and its rows of bytes, uint8, in the file's order."""

    type: str
    rows: Callable[[], np.ndarray]


def ready_tensors(
    packed: PackedFolder, matches: dict[str, Match], places: list[PairPlace]
) -> dict[str, Ready]:
    """GGUF tensor -> what was packed for it: dense matrices, and the factors of ``places``.

    Slices of stacked experts are not packed.
    """
    ready: dict[str, Ready] = {}

    def add(tensor: str, name: str, match: Match | None) -> None:
        if any(part in tensor for part in NOT_QUANTISED):
            return
        if name in packed.kinds and (match is None or match.expert is None):
            ready[tensor] = Ready(packed.kinds[name], _rows(packed, name, match))

    for name, match in matches.items():
        add(match.tensor, name, match)
    second: dict[str, list[PairPlace]] = {}
    for place in places:
        if place.match.expert is None:
            add(place.a, f"{place.leader}.lr_a.weight", None)
            second.setdefault(place.b, []).append(place)
    for b, members in second.items():
        members.sort(key=lambda place: place.rows.start if place.rows else 0)
        parts = [(f"{place.linear}.lr_b.weight", place.match) for place in members]
        kinds = {packed.kinds.get(name) for name, _ in parts}
        if len(kinds) > 1:
            raise InputError(f"{b}: its linears were quantised to different types; fuse_qkv: false")
        if (kind := kinds.pop()) is not None:
            ready[b] = Ready(kind, _stacked([_rows(packed, *part) for part in parts]))
    return ready


def _stacked(parts: list[Callable[[], np.ndarray]]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([rows() for rows in parts])


def _rows(packed: PackedFolder, name: str, match: Match | None) -> Callable[[], np.ndarray]:
    def rows() -> np.ndarray:
        data = packed.read(name).parts[GGUF_PART]
        return data if match is None else match.to_file(data)

    return rows
