"""The stages up to the compressed checkpoint, each of which leaves files and can be resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from svdexport.export.checkpoint import assembled, compressed_config, write_checkpoint
from svdexport.models.corpus import texts
from svdexport.models.loader import both_rope_forms
from svdexport.pipeline import compress
from svdexport.pipeline.factors import factorize_blocks, importance, statistics
from svdexport.pipeline.job import Job, ModelUnderWork, key, source_key
from svdexport.report.result import PlanRow

IMPORTANCE = "importance.safetensors"  # beside the base GGUF: weights for ggml's quantisers


@dataclass(frozen=True)
class Compressed:
    """What the compression stages leave.

    Attributes:
        checkpoint: folder of the compressed checkpoint (float32 factors).
        plan: one row a linear. tokens: file with calibration and evaluation tokens.
        key: hash of everything that decided it.
    """

    checkpoint: Path
    plan: tuple[PlanRow, ...]
    tokens: Path
    key: str


def run_compression(job: Job, model: ModelUnderWork) -> Compressed:
    """Text, factors, ranks and the checkpoint; finished stages are not repeated."""
    recipe = job.recipe
    origin = source_key(model.source)
    tokens_key = key(origin, recipe.calibration, recipe.evaluate, _stamp(recipe.calibration.file))
    tokens = job.work / "tokens.safetensors"
    job.stage("text", tokens_key, [tokens], lambda: _write_tokens(job, model, tokens))

    factors = job.work / "factors"
    what = recipe.compress
    factors_key = key(
        tokens_key,
        *(what.method, what.settings.model_dump(), what.group, what.targets, what.ignore),
        *(what.damping, sorted(statistics(recipe))),
    )
    job.stage("factors", factors_key, [factors], lambda: _factors(job, model, tokens, factors))

    plan_file, checkpoint = job.work / "plan.json", job.work / "checkpoint"
    checkpoint_key = key(
        factors_key, what.budget, what.allocate, what.allocation.model_dump(), what.rank_multiple
    )
    job.stage(
        "checkpoint",
        checkpoint_key,
        [plan_file, checkpoint, job.work / "base" / IMPORTANCE],
        lambda: _assemble(job, model, factors, plan_file, checkpoint),
    )
    rows = TypeAdapter(tuple[PlanRow, ...]).validate_python(json.loads(plan_file.read_text()))
    return Compressed(checkpoint, rows, tokens, checkpoint_key)


def _stamp(path: Path | None) -> list[int]:
    if path is None or not path.exists():
        return []
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _write_tokens(job: Job, model: ModelUnderWork, path: Path) -> None:
    calibration, evaluation = texts(
        job.recipe.calibration,
        job.recipe.evaluate,
        model.model,
        model.tokenizer,
        job.reporter.progress,
    )
    save_file({"calibration": calibration, "evaluation": evaluation}, path)


def _factors(job: Job, model: ModelUnderWork, tokens: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    factorize_blocks(
        job.recipe,
        model.structure,
        model.model,
        load_file(tokens)["calibration"],
        folder,
        job.reporter,
    )


def _assemble(
    job: Job, model: ModelUnderWork, factors: Path, plan_file: Path, checkpoint: Path
) -> None:
    plan = compress.allocate_ranks(job.recipe, model.structure, factors)
    low_rank = compress.low_rank_of(plan)
    shutil.rmtree(checkpoint, ignore_errors=True)
    config = both_rope_forms(compressed_config(model.checkpoint.config, low_rank))
    tensors = assembled(
        model.checkpoint, low_rank, compress.pair_tensors(job.recipe.compress, plan, factors)
    )
    write_checkpoint(checkpoint, model.source.folder, config, tensors)
    compress.save_plan(plan, plan_file)
    (job.work / "base").mkdir(exist_ok=True)
    save_file(importance(model.structure, factors), job.work / "base" / IMPORTANCE)
    for line in compress.strategy(plan):
        job.reporter.note(line)
