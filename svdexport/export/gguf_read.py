"""Read a written GGUF back with gguf-py: the second pair of eyes on a file that we wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.errors import MissingExtraError
from svdexport.export.base import TensorRecord
from svdexport.export.gguf_fuse import fuse
from svdexport.export.gguf_layout import PairPlace
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_norms import gains_of, norm_places
from svdexport.export.gguf_plan import make_plan
from svdexport.export.gguf_residual import first_factor
from svdexport.runtimes.gguf_file import adapter_of
from svdexport.safety.gguf_header import check_gguf


def read_back(
    path: Path, checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices of a written file under the checkpoint's names, as float32 in its row order.

    Read with gguf-py, dequantised by its own code. Of 1-d tensors norms alone are among them, which
    a run may have trained; the others are the base's bytes.
    Where the file's form is for a stock llama.cpp, or a pair stands beside a dense matrix, it comes
    as the ``<linear>.weight`` that the runtime computes with.
    """
    plan = make_plan(checkpoint, source, source_gguf, work)
    reader = _Reader(path)
    done = set()
    fused = fuse(plan.places, checkpoint, plan.base.file.tensors)
    for apart, together in zip(plan.places, fused, strict=True):
        place = together if together.b in reader.tensors else apart
        if place.b not in reader.tensors:
            yield f"{place.linear}.weight", _stock_weight(reader, place)
            continue
        if place.leader not in done:
            done.add(place.leader)
            yield f"{place.leader}.lr_a.weight", reader.values(place.a, place.match.expert)
        b = reader.values(place.b, place.match.expert)[place.rows or slice(None)]
        yield f"{place.linear}.lr_b.weight", place.match.from_file(b)
    compressed = {f"{place.linear}.weight" for place in plan.places}
    for name, match in plan.matches.items():
        if name in compressed or not checkpoint.has(name):
            continue
        matrix = match.from_file(_with_pair(reader, match))
        yield name, matrix.T if match.transposed else matrix
    for name, tensor in norm_places(plan.base.file, gains_of(checkpoint)).items():
        yield name, reader.values(tensor).reshape(-1)


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
    """A file's tensors, and those of its adapter if it has one."""

    def __init__(self, path: Path) -> None:
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
        if (beside := adapter_of(path)) is not None:
            check_gguf(beside)
            self.tensors |= {tensor.name: tensor for tensor in Reader(beside).tensors}

    def values(self, name: str, expert: int | None = None) -> np.ndarray:
        """A tensor, or one slice of a stacked one, as float32 (rows, row length)."""
        tensor = self.tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        values: np.ndarray = self._dequantize(data, tensor.tensor_type)
        shape = [int(n) for n in tensor.shape[::-1]][0 if expert is None else 1 :]
        return values.astype(np.float32).reshape(shape)


def _with_pair(reader: _Reader, match: Match) -> np.ndarray:
    """A dense matrix, and the product of the pair beside it where there is one; rows as in the
    file."""
    weight = reader.values(match.tensor, match.expert)
    stem = match.tensor.removesuffix(".weight")
    first = first_factor(stem, reader.tensors)
    if first is None:
        return weight
    both: np.ndarray = weight + reader.values(f"{stem}.lr_b.weight") @ reader.values(first)
    return both


def _stock_weight(reader: _Reader, place: PairPlace) -> np.ndarray:
    """The weight that a stock llama.cpp computes with, in the checkpoint's orientation."""
    match = place.match
    weight = reader.values(match.tensor, match.expert)
    if (b := f"{match.tensor}.lora_b") in reader.tensors:
        first = reader.values(f"{match.tensor}.lora_a", match.expert)
        weight = weight + reader.values(b, match.expert) @ first
    rows = match.from_file(weight)
    return rows.T if match.transposed else rows
