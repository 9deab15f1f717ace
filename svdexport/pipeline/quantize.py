"""The stage ``quantize``: weights of the checkpoint onto the grids of the exports, block by block.

The moments are those of the model that is quantised (compressed or dense), taken in one sweep over
the calibration tokens. Per export one folder of packed weights is left; the exporters write its
bytes as they are. What no grid here holds (embeddings, the head, IQ4_NL) is left to the exporters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdexport.checkpoint import Checkpoint
from svdexport.core.gptq import GptqConfig, Quantized, gptq, gptq_pair, round_to_nearest
from svdexport.core.grids import Grid
from svdexport.core.grids_gguf import GRIDS, GgufGrid
from svdexport.core.grids_onnx import NBitsGrid, from_codes, pack
from svdexport.core.lowrank import FactorPair
from svdexport.export.gguf_types import Types, held
from svdexport.export.onnx import linear_grid
from svdexport.models.blocks import InputGroup
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.loader import load_model
from svdexport.models.modules import is_linear
from svdexport.models.weights import Weights
from svdexport.packed import GGUF_PART, PackedWeight, write_packed
from svdexport.pipeline.adapters import fit_adapters
from svdexport.pipeline.artifacts import artifact_name
from svdexport.pipeline.byte_budget import TYPES_FILE
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.pipeline.stages import IMPORTANCE, Compressed
from svdexport.recipe import Export, GgufExport, OnnxExport, Quantize


@dataclass(frozen=True)
class QuantizedExports:
    """What the stage leaves: a folder of packed weights by export, and the key of it all."""

    folders: dict[Export, Path]
    key: str


def quantize_exports(job: Job, model: ModelUnderWork, compressed: Compressed) -> QuantizedExports:
    """Quantise for every export that the recipe's ``quantize`` concerns, and fit adapters for
    those that want them."""
    recipe = job.recipe
    specs = [spec for spec in recipe.export if _concerns(spec)]
    adapters = fit_adapters(job, model, compressed)
    if recipe.quantize is None or not specs:
        return QuantizedExports(adapters, compressed.key)
    folders = {spec: job.work / "quantized" / artifact_name(spec) for spec in specs}
    stage_key = key(compressed.key, recipe.quantize, specs)
    importance = job.work / "base" / IMPORTANCE

    def make() -> None:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _quantize(job, model, compressed, folders)

    files = [*folders.values(), importance]
    job.stage("quantize", stage_key, files, make)
    return QuantizedExports(adapters | folders, stage_key)


def _concerns(spec: Export) -> bool:
    if isinstance(spec, GgufExport):
        types = Types.of(spec, tied=False)
        asked = {types.linear, types.a, types.b}
        return spec.form != "stock_lora" and bool(asked & set(GRIDS))
    return isinstance(spec, OnnxExport) and linear_grid(spec) is not None


def _quantize(
    job: Job, model: ModelUnderWork, compressed: Compressed, folders: dict[Export, Path]
) -> None:
    torch.set_num_threads(job.threads)
    source = compressed.checkpoint == model.source.folder
    # A streamed model is too large to be loaded once more: the dense one's inputs then stand in.
    original = source or model.memory.streamed
    weights = model.weights if original else Weights(load_model(compressed.checkpoint))
    checkpoint = Checkpoint.open(compressed.checkpoint)
    quantize = job.recipe.quantize
    assert quantize is not None
    types: dict[str, str] = {}
    if job.recipe.compress.by_bytes:
        types = json.loads((job.work / TYPES_FILE).read_text())
    importance: dict[str, Tensor] = {}
    errors: dict[Export, list[tuple[str, Quantized]]] = {spec: [] for spec in folders}
    for moments in calibrate(
        weights,
        model.structure,
        load_file(compressed.tokens)["calibration"],
        batch=job.recipe.calibration.batch,
        statistics=frozenset({"inputs"}),
        scratch=job.work,
        progress=job.reporter.progress,
    ):
        groups = model.structure.of_block(moments.block)
        importance |= _importance(groups, moments)
        for spec, folder in folders.items():
            block = _Block(weights, checkpoint, spec, quantize, types if _is_mixed(spec) else {})
            for group in groups:
                block.add(group, moments.inputs[group.leader].matrix)
            write_packed(folder / f"block_{moments.block:04d}.safetensors", block.packed)
            errors[spec] += block.found
    for spec in filter(_is_mixed, folders):
        _vocabulary(weights.model, types, folders[spec])
    if source:  # with pairs, the factors stage has left these, and A x besides
        (job.work / "base").mkdir(exist_ok=True)
        save_file(importance, job.work / "base" / IMPORTANCE)
    for spec, found in errors.items():
        for line in _notes(artifact_name(spec), found):
            job.reporter.note(line)


def _is_mixed(spec: Export) -> bool:
    return isinstance(spec, GgufExport) and spec.type == "mixed"


def _vocabulary(network: Any, types: dict[str, str], folder: Path) -> None:
    """Embedding and head, which have no moments: rounded to nearest in the types chosen."""
    blocks = {id(p) for module in network.modules() if is_linear(module) for p in [module.weight]}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    head = network.get_output_embeddings()
    blocks.discard(id(getattr(head, "weight", None)))
    packed = {}
    for name, type_name in types.items():
        if ".lr_" in name or id(parameters.get(name)) in blocks or name not in parameters:
            continue
        grid = GRIDS[type_name]
        found = round_to_nearest(parameters[name].detach(), None, grid)
        packed[name] = PackedWeight(type_name, packed_parts(found, grid))
    write_packed(folder / "vocabulary.safetensors", packed)


class _Block:
    """The weights of one block for one export."""

    def __init__(
        self,
        weights: Weights,
        checkpoint: Checkpoint,
        spec: Export,
        quantize: Quantize,
        types: dict[str, str],
    ) -> None:
        self.weights, self.checkpoint = weights, checkpoint
        self.spec, self.quantize, self.types = spec, quantize, types
        self.packed: dict[str, PackedWeight] = {}
        self.found: list[tuple[str, Quantized]] = []

    def add(self, group: InputGroup, moment: Tensor) -> None:
        """All linears of one input: pairs by their leaders, dense ones stacked."""
        pairs: dict[str, list[str]] = {}
        dense: list[str] = []
        stock = isinstance(self.spec, GgufExport) and self.spec.form == "stock"
        for member in group.members:
            spec = self.checkpoint.low_rank.get(member.name)
            if spec is None or stock:
                dense.append(member.name)
            else:
                pairs.setdefault(spec.group, []).append(member.name)
        if dense:
            self._add_dense(dense, moment)
        for leader, members in pairs.items():
            self._add_pair(leader, members, moment)

    def _add_dense(self, names: Sequence[str], moment: Tensor) -> None:
        alike: dict[str, list[str]] = {}  # rows of one type and one moment are worked on together
        grids = {}
        for name in names:
            grid = self._grid("linear", f"{name}.weight", moment.shape[0])
            if grid is not None:
                grids[grid.name] = grid
                alike.setdefault(grid.name, []).append(name)
        for kind, members in alike.items():
            weights = [self.weights.linear(name) for name in members]
            found = self._one(torch.cat(weights), moment, grids[kind])
            self.found.append((members[0], found))
            tensors = [f"{name}.weight" for name in members]
            self._keep(tensors, [len(w) for w in weights], found, grids[kind])

    def _add_pair(self, leader: str, members: Sequence[str], moment: Tensor) -> None:
        pairs = [self.checkpoint.pair(member) for member in members]
        a, b = pairs[0].a.float(), torch.cat([pair.b.float() for pair in pairs])
        grid_a = self._grid("a", f"{leader}.lr_a.weight", a.shape[1])
        grid_b = self._grid("b", f"{leader}.lr_b.weight", a.shape[0])
        names = [f"{member}.lr_b.weight" for member in members]
        sizes = [len(pair.b) for pair in pairs]
        if grid_a is None or grid_b is None:  # B's refit and scaling need both, or neither
            for grid, tensors, weight, rows, metric in (
                (grid_a, [f"{leader}.lr_a.weight"], a, [len(a)], moment),
                (grid_b, names, b, sizes, a.double() @ moment @ a.double().T),
            ):
                if grid is not None:
                    self._keep(tensors, rows, self._one(weight, metric, grid), grid)
            return
        if self.quantize.algorithm == "gptq":
            first, second = gptq_pair(FactorPair(a, b), moment, grid_a, grid_b, self._config())
        else:
            first = round_to_nearest(a, moment, grid_a)
            inner = first.values.double() @ moment @ first.values.double().T
            second = round_to_nearest(b, inner, grid_b)
        self.found += [(f"{leader}.lr_a", first), (f"{leader}.lr_b", second)]
        self._keep([f"{leader}.lr_a.weight"], [len(a)], first, grid_a)
        self._keep(names, sizes, second, grid_b)

    def _one(self, weight: Tensor, moment: Tensor, grid: Grid) -> Quantized:
        if self.quantize.algorithm == "rtn":
            return round_to_nearest(weight, moment, grid)
        return gptq(weight.float(), moment, grid, self._config())

    def _config(self) -> GptqConfig:
        settings = self.quantize
        return GptqConfig(settings.damping, settings.order, settings.sweeps)

    def _grid(self, role: str, tensor: str, row_length: int) -> GgufGrid | NBitsGrid | None:
        """The grid of dense linears, of A or of B; None where the exporter quantises."""
        if tensor in self.types:
            return GRIDS[self.types[tensor]]
        if isinstance(self.spec, GgufExport):
            types = Types.of(self.spec, tied=False)
            return GRIDS.get(held(getattr(types, role), row_length))
        return linear_grid(self.spec) if isinstance(self.spec, OnnxExport) else None

    def _keep(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        found: Quantized,
        grid: GgufGrid | NBitsGrid,
    ) -> None:
        """Pack stacked rows and share them out among the tensors."""
        parts = packed_parts(found, grid)
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True):
            rows = {part: array[start:end] for part, array in parts.items()}
            self.packed[name] = PackedWeight(grid.name, rows)


def packed_parts(found: Quantized, grid: GgufGrid | NBitsGrid) -> dict[str, Any]:
    """Arrays by part, rows first, as :mod:`svdexport.packed` holds them."""
    if isinstance(grid, GgufGrid):
        return {GGUF_PART: grid.pack(found.codes, found.scales).numpy()}
    nbits = pack(from_codes(found.codes, found.scales, found.values.shape[1], grid))
    parts = {"weight": nbits.weight, "scales": nbits.scales}
    return parts if nbits.zeros is None else parts | {"zeros": nbits.zeros}


def _importance(groups: Iterable[InputGroup], moments: BlockMoments) -> dict[str, Tensor]:
    """Mean squares of the input channels, for what ggml quantises (the dense twin above all)."""
    found: dict[str, Tensor] = {}
    for group in groups:
        moment = moments.inputs[group.leader]
        square = (moment.matrix.diagonal() / max(1, moment.rows)).float()
        found |= {f"{member.name}.inputs": square.clone() for member in group.members}
    return found


def _notes(name: str, found: list[tuple[str, Quantized]]) -> Iterable[str]:
    """Mean relative layer error, and the linears whose moments needed more damping."""
    if not found:
        return
    mean = sum(q.error for _, q in found) / len(found)
    yield f"{name}: {len(found)} products quantised, mean relative squared output error {mean:.2e}"
    least = min(q.damping for _, q in found)
    for layer, q in found:
        if q.damping > least:
            yield f"{name}: {layer}: its moment needed a damping of {q.damping:g}"
