"""Weights that the run quantised itself, as tensors of the GGUF: bytes, permuted like the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from svdexport.checkpoint import module_name
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

    A stack of experts is taken where all its slices were packed in one type.
    """
    found: dict[str, list[tuple[int, str, Match | None]]] = {}
    for stored, match in matches.items():
        name = stored if stored in packed.kinds else module_name(stored)
        if match.expert is not None or name in packed.kinds:  # else a tied name, or nothing
            found.setdefault(match.tensor, []).append((match.expert or 0, name, match))
    fused: set[str] = set()
    for place in places:
        at = place.match.expert or 0
        first = (at, f"{place.leader}.lr_a.weight", None)
        if first not in found.setdefault(place.a, []):  # members share it
            found[place.a].append(first)
        if place.rows is not None:
            at = place.rows.start
            fused.add(place.b)
        found.setdefault(place.b, []).append((at, f"{place.linear}.lr_b.weight", place.match))
    ready: dict[str, Ready] = {}
    for tensor, parts in found.items():
        kinds = {packed.kinds.get(name) for _, name, _ in parts}
        if len(kinds) > 1 and tensor in fused:
            raise InputError(
                f"{tensor}: its linears were quantised to different types; fuse: false"
            )
        kind = kinds.pop()
        if kind is None or kinds or any(part in tensor for part in NOT_QUANTISED):
            continue
        ordered = sorted(parts, key=lambda part: part[0])
        ready[tensor] = Ready(kind, _stacked([_rows(packed, *part[1:]) for part in ordered]))
    return ready


def _stacked(parts: list[Callable[[], np.ndarray]]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([rows() for rows in parts])


def _rows(packed: PackedFolder, name: str, match: Match | None) -> Callable[[], np.ndarray]:
    def rows() -> np.ndarray:
        data = packed.read(name).parts[GGUF_PART]
        return data if match is None else match.to_file(data)

    return rows
