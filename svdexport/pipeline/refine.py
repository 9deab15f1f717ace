"""The refinement stages: from the checkpoint of the factorisation to ``work/refined``."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdexport.checkpoint import Checkpoint, module_name
from svdexport.core.gauge import balance, mixed
from svdexport.core.moments import Statistic
from svdexport.export.checkpoint import write_checkpoint
from svdexport.factorize import METHODS
from svdexport.files import write_atomic
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.corpus import more_text
from svdexport.models.decoder import Decoder
from svdexport.models.loader import load_model
from svdexport.models.modules import LowRankLinear
from svdexport.pipeline.factors import both_labels, output_moment
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.recipe import Recipe, Refine
from svdexport.recipe.refiners import Training, Tune
from svdexport.refine import REFINERS, Refined, RefineData
from svdexport.refine.pairs import set_pair

MOMENTS: frozenset[Statistic] = frozenset({"inputs", "gradients"})
_NOTES = TypeAdapter(tuple[str, ...])


@dataclass(frozen=True)
class RefinedCheckpoint:
    """What the last refiner left, what all of them say, and the stage's key.

    ``importance`` is the quantisers' file for it, of the same names as the factors stage's.
    """

    checkpoint: Path
    importance: Path
    notes: tuple[str, ...]
    key: str


def run_refinement(
    job: Job, model: ModelUnderWork, checkpoint: Path, tokens: Path, origin: str
) -> RefinedCheckpoint:
    """Run the recipe's refiners in order; each reads what the one before wrote.

    Args:
        checkpoint: to begin with. tokens: the text stage's file. origin: key of both.
    """
    notes: list[str] = []
    importance = job.work / "refine" / "importance.safetensors"
    batch = job.recipe.calibration.batch
    last = len(job.recipe.refine) - 1
    methods = [config.method for config in job.recipe.refine]
    for index, config in enumerate(job.recipe.refine):
        origin = key(origin, config.model_dump(), str(_device()))
        name = f"{index + 1}-{config.method}"
        scratch = job.work / "refine" / f"{name}-{origin[:12]}"
        out = job.work / "refined" if index == last else scratch / "checkpoint"
        record = job.work / "refine" / f"{name}.json"

        def make(
            begin: Path = checkpoint,
            config: Any = config,
            scratch: Path = scratch,
            out: Path = out,
            record: Path = record,
        ) -> None:
            scratch.mkdir(parents=True, exist_ok=True)
            found, student = _refine(job, model, begin, tokens, config, scratch)
            if out == job.work / "refined":
                found = _in_gauge(found, student, Checkpoint.open(begin).groups)
                calibration = load_file(tokens)["calibration"]
                save_file(_importance(student, calibration, batch), importance)
            _write(model, begin, found, out)
            _drop_state(scratch)
            write_atomic(record, _NOTES.dump_json(found.notes))
            for note in found.notes:
                job.reporter.note(note)

        files = [out, record]
        if index == last:
            files.append(importance)
        place = f"{index + 1} " if methods.count(config.method) > 1 else ""
        job.stage(f"refine {place}{config.method}", origin, files, make)
        notes += _NOTES.validate_json(record.read_bytes())
        checkpoint = out
    return RefinedCheckpoint(checkpoint, importance, tuple(notes), origin)


def refine_seeds(recipe: Recipe) -> dict[str, int]:
    """Seeds of the refiners that train, by their place in the recipe."""
    return {
        f"refine.{index}": entry.seed
        for index, entry in enumerate(recipe.refine)
        if isinstance(entry, Training)
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _refine(
    job: Job,
    model: ModelUnderWork,
    begin: Path,
    tokens: Path,
    config: Refine,
    scratch: Path,
) -> tuple[Refined, Decoder]:
    torch.set_num_threads(job.threads)
    text = training_text(job, model, tokens, config, scratch)
    opened = Checkpoint.open(begin)
    student = Decoder(
        load_model(begin, model.source.trust_remote_code).to(_device()), model.structure
    )

    def teacher() -> Decoder:
        return Decoder(model.model.to(_device()), model.structure)

    def moments() -> Iterator[BlockMoments]:
        wanted, both = MOMENTS & METHODS[job.recipe.compress.method].needs, both_labels(job.recipe)
        for found in calibrate(
            model.model.to("cpu"),  # moments are summed in float64, on the CPU
            model.structure,
            load_file(tokens)["calibration"],
            batch=job.recipe.calibration.batch,
            precision=job.recipe.calibration.precision,
            statistics=wanted | {"sampled_gradients"} if both else wanted,
            scratch=scratch,
            seed=job.recipe.calibration.seed,
            progress=job.reporter.progress,
        ):
            if both:  # the metric that the factors were made in
                mean = {name: output_moment(job.recipe, found, name) for name in found.gradients}
                for name, matrix in mean.items():
                    found.gradients[name].matrix = matrix
            yield found

    where = f"refine.{job.recipe.refine.index(config)}"
    data = RefineData(
        student, teacher, moments, opened.groups, text, scratch, job.reporter.progress, where
    )
    found = REFINERS[config.method].refine(data, config)
    model.release()
    if _device().type == "cuda":
        note = f"{config.method}: on {torch.cuda.get_device_name()}; a CPU gives other last digits"
        found = dataclasses.replace(found, notes=(*found.notes, note))
    return found, student


def _write(model: ModelUnderWork, begin: Path, found: Refined, out: Path) -> None:
    """The checkpoint with the refined tensors, named by their modules, in place of its own."""
    opened = Checkpoint.open(begin)
    strange = set(found.tensors) - {module_name(name) for name in opened.names()}
    if strange:
        raise ValueError(f"refined tensors that the checkpoint lacks: {sorted(strange)[:3]}")
    shutil.rmtree(out, ignore_errors=True)
    merged = (
        (name, found.tensors.get(module_name(name), value)) for name, value in opened.iter_tensors()
    )
    write_checkpoint(out, model.source.folder, opened.config, merged)


def _in_gauge(found: Refined, student: Decoder, groups: dict[str, list[str]]) -> Refined:
    """The pairs in a gauge in which quantisation costs little, in the student too."""
    tensors = dict(found.tensors)
    for leader, members in groups.items():
        first, seconds = f"{leader}.lr_a.weight", [f"{m}.lr_b.weight" for m in members]
        if not {first, *seconds} <= tensors.keys():
            continue
        a, b = tensors[first], torch.cat([tensors[name] for name in seconds])
        if len(a) <= min(a.shape[1], len(b)):  # a rank beyond the matrix's own has no balance
            a, b = mixed(*balance(a, b))
            tensors[first] = a
            parts = torch.split(b, [len(tensors[name]) for name in seconds])
            tensors |= dict(zip(seconds, parts, strict=True))
            set_pair(student.module, leader, members, a, b)
    return dataclasses.replace(found, tensors=tensors)


def training_text(
    job: Job, model: ModelUnderWork, tokens: Path, config: Refine | Tune, scratch: Path
) -> Tensor:
    """The calibration's tokens, or more of the same source where the refiner asks for them."""
    calibration: Tensor = load_file(tokens)["calibration"]
    if not isinstance(config, Training):
        return calibration
    samples = config.samples or calibration.shape[0]
    length = config.length or calibration.shape[1]
    if config.samples is None and calibration.shape[1] % length == 0:
        return calibration.reshape(-1, length)
    kept = scratch / f"text-{samples}x{length}.safetensors"
    if not kept.exists():
        found = more_text(
            job.recipe.calibration,
            samples,
            length,
            model.model,
            model.tokenizer,
            job.reporter.progress,
            job.reporter.note,
        )
        making = kept.with_suffix(".making")
        save_file({"tokens": found}, making)
        making.replace(kept)
    more: Tensor = load_file(kept)["tokens"]
    return more


def _drop_state(scratch: Path) -> None:
    """What only an unfinished training needs."""
    for path in scratch.iterdir():
        if path.is_file():
            path.unlink()


@torch.no_grad()
def _importance(student: Decoder, tokens: Tensor, batch: int) -> dict[str, Tensor]:
    """Mean squares of the linears' inputs and of A x in the refined model, for quantisers.

    The same names as the factors stage leaves (``<linear>.inputs``, ``<leader>.rank``).
    """
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def add(_module: nn.Module, args: Any) -> None:
            squares = args[0].detach().double().pow(2).reshape(-1, args[0].shape[-1]).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        hooks.append(module.register_forward_pre_hook(add))

    module = student.module
    for linear in student.structure.linears():
        part = module.get_submodule(linear.name)
        watch(f"{linear.name}.inputs", part)
        if isinstance(part, LowRankLinear) and part.first_factor is getattr(part, "lr_a", None):
            watch(f"{linear.name}.rank", part.lr_b)
    try:
        for rows in torch.split(tokens, batch):
            student.hidden(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / tokens.numel()).float().cpu() for name, total in sums.items()}
