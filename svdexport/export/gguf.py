"""Export to GGUF: llama.cpp's own conversion of the model, dense matrices replaced by pairs.

Pairs stand in the file as the low-rank contract says (``svdexport.low_rank.version`` 1). A
checkpoint without pairs gives the dense twin by the same code: its bytes are those that
llama.cpp's quantiser gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError, MissingExtraError
from svdexport.export import gguf_base
from svdexport.export.base import Exported, ExportRequest, TensorRecord
from svdexport.export.gguf_layout import LayoutBuilder, PairPlace, floats, pair_places
from svdexport.export.gguf_match import ContentIndex, Match
from svdexport.export.gguf_types import FILE_TYPES, Types
from svdexport.export.gguf_write import u32, u64, write
from svdexport.recipe import GgufExport
from svdexport.runtimes.gguf_file import GgufFile

PAIR_VERSION = 1
FILE_TYPE_KEY = "general.file_type"
DROPPED_PREFIX = "svdexport.low_rank."


@dataclass(frozen=True)
class Plan:
    """What an export and its read-back must agree on."""

    base: gguf_base.Base
    matches: dict[str, Match]
    places: list[PairPlace]


def export(request: ExportRequest) -> Exported:
    """Write one GGUF file.

    Raises:
        InputError: the converter refuses the model, a pair cannot be placed, or a tensor cannot be
            held in its type; the line names it.
    """
    spec = request.spec
    if not isinstance(spec, GgufExport):
        raise TypeError(f"a GGUF export needs a GgufExport, not {type(spec).__name__}")
    plan = make_plan(request.checkpoint, request.source, request.source_gguf, request.work)
    base = plan.base.file
    changed = changed_tensors(request.checkpoint, request.source, plan)
    types = Types.of(spec, tied="output.weight" not in base.tensors)
    layout = LayoutBuilder(base, request.checkpoint, types, plan.places, changed).build()
    extra = {FILE_TYPE_KEY: u32(FILE_TYPE_KEY, FILE_TYPES[spec.type])}
    if plan.places:
        for key, value in (("params_dense", layout.params_dense), ("params", layout.params)):
            extra[f"{DROPPED_PREFIX}{key}"] = u64(f"{DROPPED_PREFIX}{key}", value)
        extra[f"{DROPPED_PREFIX}version"] = u32(f"{DROPPED_PREFIX}version", PAIR_VERSION)
    metadata = merged_metadata(base, extra)
    records = write(request.out, metadata, layout.tensors, base.alignment)
    size = request.out.stat().st_size
    return Exported(request.out, "gguf", spec.type, size, records, tuple(layout.notes))


def merged_metadata(base: GgufFile, extra: dict[str, bytes]) -> list[bytes]:
    """The base's entries byte for byte, those in ``extra`` put in their place or at the end."""
    kept = {k: v for k, v in base.kv_bytes.items() if not k.startswith(DROPPED_PREFIX)}
    return list({**kept, **extra}.values())


def make_plan(checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path) -> Plan:
    """Base, content proof (kept in ``work``) and names of the pairs."""
    base = gguf_base.prepare(source, source_gguf, work)
    matches = find_matches(base, Checkpoint.open(source), work)
    renamed = {name: matches[there] for name, there in _renames(checkpoint, matches).items()}
    return Plan(base, renamed, pair_places(checkpoint, renamed))


def find_matches(base: gguf_base.Base, source: Checkpoint, work: Path) -> dict[str, Match]:
    """The content proof for every matrix of the source folder; made once per base and source."""
    files = [source.path / "config.json", *sorted(set(source.files.values()))]
    mark = hashlib.sha256((base.fingerprint + gguf_base.fingerprint(files)).encode()).hexdigest()
    kept = work / f"match-{mark[:16]}.npz"
    if kept.exists():
        return _load_matches(kept)
    dtype = _matrix_dtype(source) if base.given else None
    matches = ContentIndex(base.file, dtype).find(_matrices(source))
    _save_matches(kept, matches)
    return matches


def changed_tensors(
    checkpoint: Checkpoint, source: Path, plan: Plan
) -> dict[str, Callable[[], np.ndarray]]:
    """Dense tensors that the checkpoint holds otherwise than the source: file tensor -> its rows.

    Raises InputError where such a tensor was not found in the base.
    """
    if checkpoint.path.resolve() == source.resolve():
        return {}
    original = Checkpoint.open(source)
    biases = {f"{p.linear}.bias": p.match for p in plan.places}
    changed: dict[str, Callable[[], np.ndarray]] = {}
    for name in checkpoint.names():
        if ".lr_a." in name or ".lr_b." in name:
            continue
        there = name if original.has(name) else _alias(name, set(original.names()))
        if there is not None and _equal(checkpoint, name, original, there):
            continue
        match = plan.matches.get(name)
        if match is not None and match.expert is None:
            changed[match.tensor] = _placed(checkpoint, name, match)
        elif name in biases and (stem := biases[name].tensor.removesuffix(".weight")):
            if f"{stem}.bias" not in plan.base.file.tensors:
                raise InputError(f"{name}: a bias that the model does not have; cannot be placed")
            changed[f"{stem}.bias"] = _placed(checkpoint, name, biases[name])
        else:
            raise InputError(
                f"{name}: differs from the original model's and is not found in the base GGUF"
            )
    return changed


def read_back(
    path: Path, checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices of a written file under the checkpoint's names, as float32 in its row order.

    Read with gguf-py, dequantised by its own code. 1-d tensors are left out: they are exact.
    """
    plan = make_plan(checkpoint, source, source_gguf, work)
    reader = _Reader(path)
    done = set()
    for place in plan.places:
        if place.leader not in done:
            done.add(place.leader)
            yield f"{place.leader}.lr_a.weight", reader.values(place.a)
        b = place.match.from_file(reader.values(place.b))
        yield f"{place.linear}.lr_b.weight", b
    compressed = {f"{place.linear}.weight" for place in plan.places}
    for name, match in plan.matches.items():
        if name in compressed or not checkpoint.has(name):
            continue
        values = reader.values(match.tensor)
        matrix = match.from_file(values if match.expert is None else values[match.expert])
        yield name, matrix.T if match.transposed else matrix


def check_round_trip(path: Path, tensors: dict[str, TensorRecord]) -> list[str]:
    """What differs between a written file, read with gguf-py, and what was meant; empty is good."""
    reader = _Reader(path)
    problems = [f"{name}: missing in {path.name}" for name in tensors if name not in reader.tensors]
    for name, tensor in reader.tensors.items():
        meant = tensors.get(name)
        if meant is None:
            problems.append(f"{name}: not meant to be in {path.name}")
            continue
        data = np.ascontiguousarray(tensor.data).data.cast("B")
        shape = tuple(int(n) for n in tensor.shape)
        found = TensorRecord.of(shape, tensor.tensor_type.name, data)
        if found != meant:
            problems.append(f"{name}: {_difference(found, meant)}")
    return problems


def _difference(found: TensorRecord, meant: TensorRecord) -> str:
    for what in ("shape", "type", "nbytes", "sha256"):
        if (one := getattr(found, what)) != (other := getattr(meant, what)):
            return f"{what} is {one}, meant was {other}"
    return "equal"


class _Reader:
    """gguf-py's reader: the second pair of eyes on a file that we wrote."""

    def __init__(self, path: Path) -> None:
        from svdexport.safety.headers import check_gguf

        check_gguf(path)
        try:
            import gguf
        except ImportError:
            raise MissingExtraError("gguf", "reading a GGUF file") from None
        self._dequantize = gguf.quants.dequantize

        class Reader(gguf.GGUFReader):  # type: ignore[misc]
            """Keeps its bytes as a plain array: a memmap's slices cost twice as much."""

            @property
            def data(self) -> np.ndarray:
                return self._plain

            @data.setter
            def data(self, mapped: np.ndarray) -> None:
                self._plain = np.asarray(mapped)

        self.tensors = {tensor.name: tensor for tensor in Reader(path).tensors}

    def values(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        values: np.ndarray = self._dequantize(tensor.data, tensor.tensor_type)
        return values.astype(np.float32).reshape([int(n) for n in tensor.shape[::-1]])


def _matrices(source: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    for name in source.names():
        values = floats(source, name)
        if values.ndim == 2:
            yield name, values


def _matrix_dtype(source: Checkpoint) -> str:
    """``F32`` or the one 16-bit dtype of the folder's matrices."""
    return {"f16": "F16", "bf16": "BF16"}.get(gguf_base.exact_outtype(source), "F32")


def _renames(checkpoint: Checkpoint, matches: dict[str, Match]) -> dict[str, str]:
    """The checkpoint's matrix names -> the source's: the same, or one within the other's end."""
    names = {f"{linear}.weight" for linear in checkpoint.low_rank} | set(checkpoint.names())
    known = set(matches)
    found = {name: name if name in known else _alias(name, known) for name in names}
    return {name: there for name, there in sorted(found.items()) if there is not None}


def _alias(name: str, known: set[str]) -> str | None:
    """The one known name that differs only by a prefix (``transformer.``), or None."""
    near = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
    return near[0] if len(near) == 1 else None


def _equal(one: Checkpoint, name: str, other: Checkpoint, there: str) -> bool:
    mine, theirs = floats(one, name), floats(other, there)
    return mine.shape == theirs.shape and bool(np.array_equal(mine, theirs, equal_nan=True))


def _placed(checkpoint: Checkpoint, name: str, match: Match) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        matrix = floats(checkpoint, name)
        rows = match.to_file(matrix.T if match.transposed and matrix.ndim == 2 else matrix)
        return rows if rows.ndim == 2 else rows[None]

    return values


def _save_matches(path: Path, matches: dict[str, Match]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    listing = [
        [name, m.tensor, m.expert, m.transposed, m.sure, m.order is not None]
        for name, m in matches.items()
    ]
    orders = {str(i): m.order for i, m in enumerate(matches.values()) if m.order is not None}
    part = path.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, listing=np.array(json.dumps(listing)), **orders)
    part.replace(path)


def _load_matches(path: Path) -> dict[str, Match]:
    with np.load(path, allow_pickle=False) as data:
        listing = json.loads(str(data["listing"]))
        return {
            name: Match(tensor, expert, data[str(i)] if ordered else None, transposed, sure)
            for i, (name, tensor, expert, transposed, sure, ordered) in enumerate(listing)
        }
