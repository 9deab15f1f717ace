"""The stage ``quantize``: weights of the checkpoint onto the grids of the exports, block by block.

The moments are those of the model that is quantised (compressed or dense), taken in one sweep over
the calibration tokens; or, in sequence, each group's are taken behind what is quantised already.
Per export one folder of packed weights is left; the exporters write its bytes as they are. What no
grid here holds, and the embedding and head but for a byte budget's, is left to the exporters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.moments import CrossMoments
from svdexport.core.sequence import sequence_target
from svdexport.export.gguf_types import Types
from svdexport.export.onnx import linear_grid
from svdexport.models.blocks import InputGroup
from svdexport.models.calibrate import calibrate
from svdexport.models.loader import load_model
from svdexport.models.sequence import Walk
from svdexport.models.weights import StreamedWeights, Weights
from svdexport.packed import write_packed
from svdexport.pipeline import vocabulary
from svdexport.pipeline.adapters import fit_adapters
from svdexport.pipeline.artifacts import artifact_name
from svdexport.pipeline.byte_budget import RESIDUAL_FILE, TYPES_FILE
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.pipeline.quantize_block import BlockQuantizer
from svdexport.pipeline.sequential import pair_in_sequence
from svdexport.pipeline.stages import IMPORTANCE, Compressed
from svdexport.pipeline.tune import tune_gains
from svdexport.recipe import Export, GgufExport, OnnxExport

MIX = 1.0  # weight of the original inputs beside those behind what is quantised (core/sequence.py)


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
    for spec in recipe.export:
        if recipe.quantize and isinstance(spec, GgufExport) and spec.form == "stock_lora":
            name = artifact_name(spec)
            job.reporter.note(f"{name}: base and adapter by llama.cpp's quantiser, not by quantize")
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
    work = _Work(
        job,
        model,
        model.weights if source else _compressed_weights(model, compressed.checkpoint),
        Checkpoint.open(compressed.checkpoint),
        load_file(compressed.tokens)["calibration"],
        *_chosen(job),
    )
    quantize = job.recipe.quantize
    assert quantize is not None
    found = (_in_sequence if quantize.sequential else _at_once)(work, folders)
    for spec in filter(_is_mixed, folders):
        vocabulary.write(work.weights.model, work.types, work.tokens, quantize, folders[spec])
    if source:  # with pairs, the factors stage has left these, and A x besides
        (job.work / "base").mkdir(exist_ok=True)
        save_file(found.importance, job.work / "base" / IMPORTANCE)
    if quantize.tune is not None:
        for spec, folder in folders.items():
            tune_gains(job, model, compressed, spec, folder)
    for spec, products in found.products.items():
        for line in _notes(artifact_name(spec), products):
            job.reporter.note(line)


def _compressed_weights(model: ModelUnderWork, checkpoint: Path) -> Weights:
    """Those of the checkpoint, streamed where the model's own are."""
    trusted = model.source.trust_remote_code
    if not model.memory.streamed:
        return Weights(load_model(checkpoint, trusted))
    return StreamedWeights(checkpoint, model.structure.blocks, trusted)


@dataclass(frozen=True)
class _Work:
    """What is quantised: the checkpoint and its model, the tokens; of a byte budget the types, and
    by linear in residual form the one whose A it uses and the rank."""

    job: Job
    model: ModelUnderWork
    weights: Weights
    checkpoint: Checkpoint
    tokens: Tensor
    types: dict[str, str]
    residual: dict[str, tuple[str, int]]

    def block(self, spec: Export) -> BlockQuantizer:
        quantize = self.job.recipe.quantize
        assert quantize is not None
        mixed = (self.types, self.residual) if _is_mixed(spec) else ({}, {})
        return BlockQuantizer(self.weights, self.checkpoint, spec, quantize, *mixed)


def _chosen(job: Job) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """What a budget in bytes has left in the work folder."""
    if not job.recipe.compress.by_bytes:
        return {}, {}
    types, residual = ((job.work / name).read_text() for name in (TYPES_FILE, RESIDUAL_FILE))
    beside = json.loads(residual)
    return json.loads(types), {
        name: (leader, found["rank"])
        for leader, found in beside.items()
        for name in found["linears"]
    }


@dataclass(frozen=True)
class _Found:
    """Mean squares of the linears' inputs, and by export every product's name, error and damping:
    the matrices themselves are as large as the model."""

    importance: dict[str, Tensor] = field(default_factory=dict)
    products: dict[Export, list[tuple[str, float, float]]] = field(default_factory=dict)

    def keep(self, spec: Export, block: BlockQuantizer, file: Path) -> None:
        write_packed(file, block.packed, block.leaders)
        found = [(name, q.error, q.damping) for name, q in block.found]
        self.products.setdefault(spec, []).extend(found)


def _block_file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:04d}.safetensors"


def _at_once(work: _Work, folders: dict[Export, Path]) -> _Found:
    """In the metric of the inputs that the model has before anything is quantised."""
    found, calibration = _Found(), work.job.recipe.calibration
    for moments in calibrate(
        work.weights,
        work.model.structure,
        work.tokens,
        batch=calibration.batch,
        precision=calibration.precision,
        statistics=frozenset({"inputs"}),
        scratch=work.job.work,
        progress=work.job.reporter.progress,
    ):
        groups = work.model.structure.of_block(moments.block)
        for group in groups:
            moment = moments.inputs[group.leader]
            found.importance.update(_importance(group, moment.matrix, moment.rows))
        for spec, folder in folders.items():
            block = work.block(spec)
            for group in groups:
                block.add(group, moments.inputs[group.leader].matrix)
            found.keep(spec, block, _block_file(folder, moments.block))
    return found


def _in_sequence(work: _Work, folders: dict[Export, Path]) -> _Found:
    """Every group meets the inputs that it has behind what was quantised before it, and comes near
    to what takes those to the original model's outputs (:mod:`svdexport.core.sequence`).
    """
    found, recipe = _Found(), work.job.recipe
    for spec, folder in folders.items():
        block = work.block(spec)

        def refit(
            group: InputGroup,
            weights: Sequence[Tensor],
            moments: CrossMoments,
            block: BlockQuantizer = block,
        ) -> Sequence[Tensor]:
            names = [member.name for member in group.members]
            if block.stock or recipe.refine:  # not W: the pair's product, and what was trained
                weights = [work.weights.linear(name) for name in names]
            found.importance.update(_importance(group, moments.original, work.tokens.numel()))
            target, metric = sequence_target(torch.cat(list(weights)), moments, MIX)
            sizes = [member.out_features for member in group.members]
            anew = None
            if recipe.compress.sequential and (rank := block.rank_of(group)) is not None:
                inputs, files = moments.compressed, work.job.work / "factors"
                anew = pair_in_sequence(recipe, group, target, metric, inputs, rank, files)
            targets = dict(zip(names, torch.split(target, sizes), strict=True))
            block.add(group, metric, targets, anew)
            return [block.values.pop(n, w) for n, w in zip(names, weights, strict=True)]

        walk = Walk(
            work.model.weights,
            work.model.structure,
            work.model.structure.groups,
            work.tokens,
            batch=work.job.recipe.calibration.batch,
            scratch=work.job.work,
        )
        for index in walk.run(refit, work.job.reporter.progress):
            found.keep(spec, block, _block_file(folder, index))
            block.clear()
    return found


def _is_mixed(spec: Export) -> bool:
    return isinstance(spec, GgufExport) and spec.type == "mixed"


def _importance(group: InputGroup, moment: Tensor, rows: int) -> dict[str, Tensor]:
    """Mean squares of the input channels, for what ggml quantises (the dense twin above all)."""
    square = (moment.diagonal() / max(1, rows)).float()
    return {f"{member.name}.inputs": square.clone() for member in group.members}


def _notes(name: str, found: list[tuple[str, float, float]]) -> Iterable[str]:
    """Mean relative layer error, and the linears whose moments needed more damping."""
    if not found:
        return
    mean = sum(error for _, error, _ in found) / len(found)
    yield f"{name}: {len(found)} products quantised, mean relative squared output error {mean:.2e}"
    least = min(damping for _, _, damping in found)
    for layer, _, damping in found:
        if damping > least:
            yield f"{name}: {layer}: its moment needed a damping of {damping:g}"
