"""The exact size of an ONNX export that is not written yet, from names, shapes and ranks.

The onnxruntime-genai builder makes the very graph of the export, over tensors that have shapes and
no values; their places in the data file are counted and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.core.grids_onnx import NBitsGrid
from svdexport.errors import InputError
from svdexport.export.onnx import DATA_FILE, build_plan, described
from svdexport.export.onnx_builder import emitted, load_config
from svdexport.export.onnx_emit import PairEmitter
from svdexport.export.onnx_last import last_position_graph
from svdexport.export.onnx_pack import DataWriter, aligned
from svdexport.export.onnx_plan import Row, why_not
from svdexport.recipe import OnnxExport

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Unwritten(Checkpoint):
    """A checkpoint by its ranks: tensors have shapes and, repeated, a one for all values.

    Not a zero: the builder leaves out biases of zeros.

    Attributes:
        shapes: of every tensor, factors included.
    """

    shapes: Shapes

    def names(self) -> list[str]:
        return sorted(self.shapes)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def tensor(self, name: str) -> Tensor:
        import torch

        if name not in self.shapes:
            raise InputError(f"{self.path}: tensor {name} is missing")
        return torch.ones(()).expand(self.shapes[name])


class Places(DataWriter):
    """Counts the places of tensors in a data file that is not written.

    Attributes:
        end: bytes of the file so far.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.records = {}
        self.end = 0

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        offset = aligned(self.end, array.nbytes)
        self.end = offset + array.nbytes
        kind = ir.DataType.from_numpy(array.dtype)
        return self.external(name, offset, array.nbytes, kind, array.shape)


class SizeEmitter(PairEmitter):
    """Emits the graph over arrays whose values are one repeated zero."""

    def stacked(self, tensors: Sequence[str]) -> tuple[np.ndarray, list[Row]]:
        shapes = [self.plan.checkpoint.tensor(name).shape for name in tensors]
        rows = [(name, int(shape[0])) for name, shape in zip(tensors, shapes, strict=True)]
        return _zeros((sum(count for _, count in rows), int(shapes[0][1])), np.float32), rows

    def packed(
        self, weight: np.ndarray, grid: NBitsGrid, tensors: Sequence[str]
    ) -> dict[str, np.ndarray]:
        rows, blocks = weight.shape[0], grid.blocks(weight.shape[1])
        codes = _zeros((rows, blocks, grid.block_size * grid.bits // 8), np.uint8)
        return {
            f"weight_Q{grid.bits}": codes,
            "weight_scales": _zeros((rows, blocks), np.float32),
        }

    def halved(self, array: np.ndarray, name: str) -> np.ndarray:
        return _zeros(array.shape, np.float16)

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[Tensor, Tensor]:
        """Instead of the builder's, which takes half a second for a context of 131072."""
        import torch

        width = int(self.rope_attrs["partial_rotary_factor"] * self.head_size)
        zeros = torch.zeros(()).expand(self.rope_attrs["cache_length"], width)
        return zeros, zeros


class HalfSizeEmitter(SizeEmitter):
    """Of a model in float16, whose embedding loses nothing in it."""

    def halved_exactly(self, array: np.ndarray) -> np.ndarray | None:
        return _zeros(array.shape, np.float16)


class FullSizeEmitter(SizeEmitter):
    """Of a model in another type, whose embedding is taken to have values beyond float16's."""

    def halved_exactly(self, array: np.ndarray) -> np.ndarray | None:
        return None


def exact_bytes(
    spec: OnnxExport,
    source: Path,
    dtype: str,
    parameters: Shapes,
    low_rank: dict[str, PairSpec],
    work: Path,
) -> int:
    """Bytes of both graphs and their data file, as ``Exported.bytes`` counts them.

    Args:
        source: the model's folder, of which config.json is read. dtype: of its weights.
        parameters: the model's tensors. low_rank: the pairs, by linear; none for the dense twin.
        work: scratch folder.

    Raises InputError where the builder does not make the graph.
    """
    config = load_config(source)
    reason = why_not(
        config, latent=spec.kv_cache == "latent", standard=spec.operators == "standard"
    )
    if reason is not None:
        raise InputError(f"graph by torch.onnx: {reason}")
    shapes = dict(parameters)
    for linear, pair in low_rank.items():
        rows, columns = shapes.pop(f"{linear}.weight")
        shapes[f"{linear}.lr_b.weight"] = (rows, pair.rank)
        if linear == pair.group:
            shapes[f"{linear}.lr_a.weight"] = (pair.rank, columns)
    checkpoint = Unwritten(source, {}, low_rank, {}, shapes)
    places = Places(work, DATA_FILE)
    emitter = HalfSizeEmitter if dtype == "float16" else FullSizeEmitter
    maker = emitted(build_plan(spec, checkpoint, source), places, config, work, emitter)
    every = described(maker.model, maker.emission)
    last = last_position_graph(every)
    return places.end + int(every.ByteSize()) + int(last.ByteSize())


def _zeros(shape: tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    return np.broadcast_to(kind(0), shape)
