"""What an export and its read-back agree on: the base, the content proof, the pairs' names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdexport.checkpoint import Checkpoint, module_name
from svdexport.errors import InputError
from svdexport.export import gguf_base
from svdexport.export.gguf_layout import PairPlace, floats, pair_places
from svdexport.export.gguf_match import ContentIndex, Match


@dataclass(frozen=True)
class Plan:
    """What an export and its read-back must agree on."""

    base: gguf_base.Base
    matches: dict[str, Match]
    places: list[PairPlace]


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
    stored = {module_name(there): there for there in original.names()}
    biases = {f"{p.linear}.bias": p.match for p in plan.places}
    changed: dict[str, Callable[[], np.ndarray]] = {}
    for name in checkpoint.names():
        if ".lr_a." in name or ".lr_b." in name:
            continue
        there = stored.get(module_name(name)) or _alias(name, stored.values())
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


def unproven(plan: Plan) -> list[str]:
    """Notes on the base's matrices that hold no weight of the source folder as it is."""
    held = Counter(match.tensor for match in plan.matches.values())
    found = [
        name
        for name, info in plan.base.file.tensors.items()
        if len(info.ne) > 1 and held[name] < (info.ne[2] if len(info.ne) > 2 else 1)
    ]
    if not found:
        return []
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return [
        f"{len(found)} matrices of the base hold no weight of the model row by row and are taken "
        f"from llama.cpp's converter unproven: {some}"
    ]


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
    names = {f"{linear}.weight" for linear in checkpoint.low_rank} | {
        name for name in checkpoint.names() if ".lr_a." not in name and ".lr_b." not in name
    }
    known = {module_name(name): name for name in matches}
    found = {name: known.get(module_name(name)) or _alias(name, matches) for name in names}
    return {name: there for name, there in sorted(found.items()) if there is not None}


def _alias(name: str, known: Iterable[str]) -> str | None:
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
