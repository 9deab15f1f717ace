"""The tensors of an exported GGUF: the base's, with dense matrices replaced by their pairs.

Names follow the low-rank contract: ``<stem>.lr_a.weight`` and ``<stem>.lr_b.weight`` for a dense
``<stem>.weight``; linears that share A find it under the group's stem.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.core.lowrank import FactorPair
from svdexport.errors import InputError
from svdexport.export.gguf_importance import Importance
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_types import FLOATS, NOT_QUANTISED, Types, held
from svdexport.export.gguf_write import Planned
from svdexport.runtimes.gguf_file import GgufFile, nbytes
from svdexport.safety.gguf_header import GgufTensor

# Stems whose linears read one input, and the stem under which they find a shared A.
SHARED_STEMS = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
}


@dataclass(frozen=True)
class PairPlace:
    """Where a compressed linear's factors stand in the file.

    Attributes:
        linear: its name in the checkpoint.
        leader: the linear whose A it uses.
        a: tensor name of A; a shared one is the same for all members.
        b: tensor name of B.
        match: where the dense matrix stood in the base.
        rows: those of B, where several linears share one tensor (``gguf_fuse``); else None.
    """

    linear: str
    leader: str
    a: str
    b: str
    match: Match
    rows: slice | None = None


class Ready(Protocol):
    """A tensor that is quantised already: its type, and its rows of bytes in the file's order."""

    @property
    def type(self) -> str: ...

    @property
    def rows(self) -> Callable[[], np.ndarray]: ...


@dataclass
class Layout:
    """Tensors in file order and what is to be said about them."""

    tensors: list[Planned] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    params_dense: int = 0
    params: int = 0


def pair_places(checkpoint: Checkpoint, matches: dict[str, Match]) -> list[PairPlace]:
    """Names for every pair of the checkpoint. Raises as ``places_of`` does."""
    return places_of(checkpoint.groups, matches)


def places_of(groups: Mapping[str, Sequence[str]], matches: Mapping[str, Match]) -> list[PairPlace]:
    """Names for the pairs of linears that share an A, by their leaders.

    Raises InputError where a pair's dense matrix was not found in the base, or stands there for
    another weight too.
    """
    users = Counter((match.tensor, match.expert) for match in matches.values())
    places = []
    for leader, members in groups.items():
        for member in members:
            match = matches.get(f"{member}.weight")
            if match is None:
                raise InputError(
                    f"{member}: its weight's rows are not found in the base GGUF, so the "
                    "pair cannot be placed; leave it dense (compress.ignore)"
                )
            if any(part in match.tensor for part in NOT_QUANTISED):
                raise InputError(
                    f"{member}: llama.cpp does not run {match.tensor} as a pair; leave it dense"
                )
            if users[match.tensor, match.expert] > 1:
                raise InputError(
                    f"{member}: {match.tensor} holds another weight too (tied); leave it dense"
                )
        found = [matches[f"{member}.weight"] for member in members]
        stems = [match.tensor.removesuffix(".weight") for match in found]
        for member, stem, match, own in zip(members, stems, found, a_stems(stems), strict=True):
            places.append(
                PairPlace(member, leader, f"{own}.lr_a.weight", f"{stem}.lr_b.weight", match)
            )
    return places


def a_stems(stems: Sequence[str]) -> list[str]:
    """Under which stem each linear of a group finds its A.

    Those of one of ``SHARED_STEMS`` share it, where there are several; others have a copy each. A
    group may be larger than that: attention and MLP of some architectures read one norm.
    """
    own = []
    for stem in stems:
        prefix, _, name = stem.rpartition(".")
        shared = next((group for group, names in SHARED_STEMS.items() if name in names), stem)
        own.append(f"{prefix}.{shared}" if shared != stem else stem)
    counts = Counter(own)
    return [a if counts[a] > 1 else stem for a, stem in zip(own, stems, strict=True)]


class LayoutBuilder:
    """Plans the file for one checkpoint over one base."""

    def __init__(
        self,
        base: GgufFile,
        checkpoint: Checkpoint,
        types: Types,
        places: list[PairPlace],
        changed: Mapping[str, Callable[[], np.ndarray]],
        importance: Importance,
        ready: Mapping[str, Ready],
        beside: Mapping[str, list[Planned]] = MappingProxyType({}),
    ) -> None:
        self._base = base
        self._checkpoint = checkpoint
        self._types = types
        self._places = {found[0].match.tensor: found for found in stacked(places, base)}
        self._fused: dict[str, list[PairPlace]] = {}
        for place in places:
            if place.rows is not None:
                self._fused.setdefault(place.b, []).append(place)
        self._changed = changed
        self._importance = importance
        self._ready = ready
        self._beside = beside
        self._packed: Counter[str] = Counter()
        self._layout = Layout()
        self._fallbacks: Counter[tuple[str, str, str]] = Counter()
        self._extra_bytes: Counter[tuple[str, str, str]] = Counter()
        self._requantised: Counter[tuple[str, str]] = Counter()
        self._done: set[str] = set()

    def build(self) -> Layout:
        """All tensors, in the base's order."""
        for name in self._base.tensors:
            if places := self._places.get(name):
                self._add_pair(places)
            else:
                self._add_dense(name)
            if beside := self._beside.get(name):
                self._add_beside(name, beside)
        self._note_fallbacks()
        self._note_copies()
        self._note_requantised()
        self._note_packed()
        return self._layout

    def _add_pair(self, places: list[PairPlace]) -> None:
        """One pair, or those of all experts that a tensor stacks, one slice each."""
        place, checkpoint = places[0], self._checkpoint
        shapes = {(p.rank, p.in_features, p.out_features) for p in map(self._pair, places)}
        rank, n_in, n_out = shapes.pop()
        info = self._base.tensors[place.match.tensor]
        if (n_in, n_out) != info.ne[:2]:
            raise InputError(
                f"{place.linear}: a pair for {n_out} x {n_in}, "
                f"but {place.match.tensor} is {info.ne[::-1]}"
            )
        if shapes:
            raise InputError(f"{place.linear}: the experts of a layer must have one rank")
        stack, leaders = info.ne[2:], [p.leader for p in places]
        self._layout.params_dense += len(places) * n_in * n_out
        self._layout.params += len(places) * rank * n_out
        if place.a not in self._done:
            self._layout.params += len(places) * rank * n_in
            self._add(
                place.a,
                (n_in, rank, *stack),
                self._types.a,
                lambda: np.concatenate(
                    [floats(checkpoint, f"{p.leader}.lr_a.weight") for p in places]
                ),
                self._importance.of_first(leaders),
            )
        parts = sorted(self._fused.get(place.b, []), key=_first_row) or places
        self._add(
            place.b,
            (rank, n_out if stack else sum(self._pair(p).out_features for p in parts), *stack),
            self._types.b,
            lambda: np.concatenate(
                [p.match.to_file(floats(checkpoint, f"{p.linear}.lr_b.weight")) for p in parts]
            ),
            self._importance.of_second(leaders, rank),
        )

    def _add_beside(self, name: str, factors: list[Planned]) -> None:
        """A pair for what a quantised matrix loses; a shared A once."""
        elements = int(np.prod(self._base.tensors[name].ne, dtype=np.int64))
        self._layout.params_dense += elements
        self._layout.params += elements
        for planned in factors:
            if planned.name not in self._done:
                self._done.add(planned.name)
                self._packed[planned.type] += 1
                self._layout.params += int(np.prod(planned.ne, dtype=np.int64))
                self._layout.tensors.append(planned)

    def _pair(self, place: PairPlace) -> FactorPair:
        return self._checkpoint.pair(place.linear)

    def _add_dense(self, name: str) -> None:
        info = self._base.tensors[name]
        base, asked = self._base, self._types.dense(name, info)
        weights = self._importance.of_tensor(name)
        if name in self._ready:
            self._add(name, info.ne, asked, self._ready[name].rows)
        elif changed := self._changed.get(name):
            self._add(name, info.ne, asked, changed, weights)
        elif held(asked, info.ne[0]) == info.type or len(info.ne) < 2:
            self._layout.tensors.append(Planned(name, info.ne, info.type, lambda: base.raw(name)))
        else:
            if info.type not in FLOATS:
                self._requantised[info.type, held(asked, info.ne[0])] += 1
            self._add(name, info.ne, asked, lambda: base.rows(name), weights)

    def _add(
        self,
        name: str,
        ne: tuple[int, ...],
        asked: str,
        values: Callable[[], np.ndarray],
        importance: np.ndarray | None = None,
    ) -> None:
        if name in self._done:
            return
        self._done.add(name)
        type_name = held(asked, ne[0])
        ready = self._ready.get(name)
        if ready is not None:
            self._packed[ready.type] += 1
            values, importance = ready.rows, None
        chosen = type_name if ready is None else ready.type
        planned = Planned(name, ne, chosen, values, importance)
        if chosen == type_name != asked:
            key = (asked, type_name, re.sub(r"\d+", "N", name))
            self._fallbacks[key] += 1
            elements = int(np.prod(ne, dtype=np.int64))
            self._extra_bytes[key] += planned.nbytes - nbytes(asked, elements)
        self._layout.tensors.append(planned)

    def _note_fallbacks(self) -> None:
        for (asked, given, name), count in sorted(self._fallbacks.items()):
            extra = self._extra_bytes[asked, given, name]
            self._layout.notes.append(
                f"{name}: {count} of type {given} instead of {asked}, whose blocks the row length "
                f"does not fill ({extra:+,} bytes)"
            )

    def _note_copies(self) -> None:
        """A shared A that has no shared name in llama.cpp stands once per member."""
        names: dict[str, set[str]] = {}
        for place in itertools.chain.from_iterable(self._places.values()):
            names.setdefault(place.leader, set()).add(place.a)
        copied = {leader: len(found) - 1 for leader, found in names.items() if len(found) > 1}
        if copied:
            some = ", ".join(list(copied)[:3]) + (", ..." if len(copied) > 3 else "")
            self._layout.notes.append(
                f"{sum(copied.values())} further copies of a shared A were written, since "
                f"llama.cpp finds none under a shared name there: {some}"
            )

    def _note_requantised(self) -> None:
        """Dense tensors of a quantised input were dequantised to get the type asked for."""
        for (given, now), count in sorted(self._requantised.items()):
            self._layout.notes.append(f"{count} dense tensors of the given GGUF: {given} to {now}")

    def _note_packed(self) -> None:
        for type_name, count in sorted(self._packed.items()):
            self._layout.notes.append(f"{count} tensors hold the run's own {type_name} values")


def _first_row(place: PairPlace) -> int:
    return place.rows.start if place.rows else 0


def stacked(places: list[PairPlace], base: GgufFile) -> list[list[PairPlace]]:
    """The places by tensor of the base: one each, or those of all experts in their order.

    Raises InputError where some experts of a tensor only have a pair.
    """
    found: dict[str, list[PairPlace]] = {}
    for place in places:
        found.setdefault(place.match.tensor, []).append(place)
    return [_by_expert(together, base.tensors[name]) for name, together in found.items()]


def _by_expert(places: list[PairPlace], info: GgufTensor) -> list[PairPlace]:
    """A tensor's pairs in the order of its slices; all or none of a layer's experts have one."""
    if places[0].match.expert is None:
        return places
    ordered = sorted(places, key=lambda place: place.match.expert or 0)
    if [place.match.expert for place in ordered] != list(range(info.ne[2])):
        raise InputError(
            f"{places[0].linear}: {len(places)} of {info.ne[2]} experts of "
            f"{places[0].match.tensor} are compressed; llama.cpp takes all or none"
        )
    return ordered


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor of the checkpoint as float32."""
    import torch

    values: np.ndarray = checkpoint.tensor(name).to(torch.float32).numpy()
    return values
