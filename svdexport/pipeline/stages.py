"""The stages up to the compressed checkpoint, each of which leaves files and can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdexport.allocate import STRATEGIES
from svdexport.checkpoint import is_encoder
from svdexport.core.moments import NEED_GRADIENTS
from svdexport.errors import RecipeError
from svdexport.export.checkpoint import assembled, compressed_config, write_checkpoint
from svdexport.files import write_atomic
from svdexport.models.corpus import encoder_texts, model_writes, texts
from svdexport.models.loader import both_rope_forms
from svdexport.pipeline import compress, speed_budget
from svdexport.pipeline.byte_budget import allocate_bytes
from svdexport.pipeline.factor_files import importance, moment_trouble
from svdexport.pipeline.factors import chosen_groups, factorize_blocks, finished_blocks, statistics
from svdexport.pipeline.inputs import texts_stamp
from svdexport.pipeline.job import Job, Memory, ModelUnderWork, key, source_key
from svdexport.pipeline.refine import run_refinement
from svdexport.pipeline.sequential import fitted_dense, refactor_in_sequence
from svdexport.pipeline.trials import measured
from svdexport.recipe import Recipe
from svdexport.report.result import PlanRow
from svdexport.runtimes.sentence import pooling_of

MEMORY = "memory.txt"  # whether the weights were streamed when the factors were made, and why
TROUBLE = "trouble.json"  # what was odd about the moments, for the report
IMPORTANCE = "importance.safetensors"  # beside the base GGUF: weights for ggml's quantisers


@dataclass(frozen=True)
class Compressed:
    """What the compression stages leave.

    Attributes:
        checkpoint: folder of the compressed checkpoint (float32 factors), refined where the
            recipe says so.
        plan: one row a linear. tokens: file with calibration and evaluation tokens.
        key: hash of everything that decided it.
        notes: what the refiners say.
    """

    checkpoint: Path
    plan: tuple[PlanRow, ...]
    tokens: Path
    key: str
    notes: tuple[str, ...] = ()


def run_compression(job: Job, model: ModelUnderWork) -> Compressed:
    """Text, factors, ranks, the checkpoint, refinement; finished stages are not repeated."""
    recipe = job.recipe
    check_kind(recipe, model.checkpoint.config)
    if is_encoder(model.checkpoint.config):
        pooling_of(model.source.folder)  # or its refusal, before any work
    check_streamed(recipe, lambda: model.memory)
    origin = source_key(model.source)
    tokens_key = key(origin, recipe.calibration, recipe.evaluate, texts_stamp(recipe))
    tokens = job.work / "tokens.safetensors"
    job.stage("text", tokens_key, [tokens], lambda: _write_tokens(job, model, tokens))

    if recipe.compress.method == "none":
        write_atomic(job.work / MEMORY, model.memory.note)
        write_atomic(job.work / TROUBLE, json.dumps([]))
        rows = tuple(compress.plan_rows(compress.all_dense(recipe, model.structure)))
        return Compressed(model.source.folder, rows, tokens, key(tokens_key, "none"))

    factors = job.work / "factors"
    what = recipe.compress
    factors_key = key(
        tokens_key,
        *(what.method, what.settings.model_dump(), what.group, what.targets, what.ignore),
        *(what.damping, what.sequential, sorted(statistics(recipe))),
    )
    if what.by_bytes:  # which also asks for predictions of quantisation losses
        assert recipe.quantize is not None and what.budget is not None
        asked = recipe.quantize.model_dump(exclude={"tune"}), "residual" in what.budget.forms
        factors_key = key(factors_key, *asked)
    memory = job.work / MEMORY
    job.stage(
        "factors",
        factors_key,
        [factors, memory],
        lambda: _factors(job, model, tokens, factors, factors_key),
    )
    job.ranks.dismiss()

    plan_file, checkpoint = job.work / "plan.json", job.work / "checkpoint"
    checkpoint_key = key(
        factors_key, what.budget, what.allocate, what.allocation.model_dump(), what.rank_multiple
    )
    job.stage(
        "checkpoint",
        checkpoint_key,
        [plan_file, checkpoint, job.work / IMPORTANCE, job.work / TROUBLE],
        lambda: _assemble(job, model, tokens, factors, plan_file, checkpoint),
    )
    rows = TypeAdapter(tuple[PlanRow, ...]).validate_python(json.loads(plan_file.read_text()))
    (job.work / "base").mkdir(exist_ok=True)
    if not recipe.refine:
        shutil.copyfile(job.work / IMPORTANCE, job.work / "base" / IMPORTANCE)
        return Compressed(checkpoint, rows, tokens, checkpoint_key)
    refined = run_refinement(job, model, checkpoint, tokens, checkpoint_key)
    shutil.copyfile(refined.importance, job.work / "base" / IMPORTANCE)
    return Compressed(refined.checkpoint, rows, tokens, refined.key, refined.notes)


def check_kind(recipe: Recipe, config: dict[str, Any]) -> None:
    """Refuse, as RecipeError, what the model of a config.json, a decoder or an encoder, lacks."""
    if is_encoder(config):
        check_encoder(recipe)
    else:
        check_gates(recipe, ("min_cosine", "min_rank_correlation"), "only an encoder's embeddings")


def check_encoder(recipe: Recipe) -> None:
    """Refuse, as RecipeError, what a model without a language-model head cannot do."""
    what = recipe.compress
    if statistics(recipe) & NEED_GRADIENTS:
        raise RecipeError(
            f"compress: method {what.method} with allocate {what.allocate} needs a language "
            "model's loss, which an encoder does not have; use svd_llm"
        )
    if model_writes(recipe.calibration, recipe.evaluate):
        raise RecipeError(
            "calibration.source, evaluate.text: an encoder writes no text; give both as files"
        )
    if what.budget is not None and what.budget.speedup is not None:
        raise RecipeError(
            "compress.budget.speedup: is of a token that is written, and an encoder writes none; "
            "give param_ratio"
        )
    if recipe.refine:
        raise RecipeError("refine: refiners need a language model, which an encoder is not")
    for entry in recipe.export:
        if entry.format == "gguf":
            raise RecipeError("export: an encoder is exported as onnx or checkpoint, not as gguf")

    of_text = ("max_perplexity_ratio", "max_mean_kld", "min_same_top", "min_decode_speedup")
    check_gates(recipe, of_text, "only a language model's next tokens")


def check_streamed(recipe: Recipe, memory: Callable[[], Memory]) -> None:
    """Refuse, as RecipeError, what needs all weights at once where they are streamed."""
    what, tune = recipe.compress, recipe.quantize and recipe.quantize.tune
    needs, instead = "", ""
    if what.method != "none" and STRATEGIES[what.allocate].measure is not None:
        needs = f"compress.allocate: {what.allocate} measures the whole model"
        instead = "; choose uniform, greedy, svd_llm_v2, adacr or lorc"
    elif what.by_bytes:
        needs = "compress.budget.bytes runs the model as a whole"
    elif tune is not None:
        needs = "quantize.tune trains the model as a whole"
    if needs and memory().streamed:
        raise RecipeError(f"{needs}, but {memory().note}{instead}")


def check_gates(recipe: Recipe, names: tuple[str, ...], whose: str) -> None:
    """Refuse, as RecipeError, gates on what this kind of model does not have."""
    for name in names:
        if getattr(recipe.gates, name) is not None:
            raise RecipeError(f"gates.{name}: there for {whose}; leave it out")


def _write_tokens(job: Job, model: ModelUnderWork, path: Path) -> None:
    recipe = job.recipe
    if is_encoder(model.checkpoint.config):
        pair = encoder_texts(recipe.calibration, recipe.evaluate, model.tokenizer)
        save_file({"calibration": pair[0], "evaluation": pair[1]}, path)
        return
    written = model_writes(recipe.calibration, recipe.evaluate)
    if written and model.memory.streamed:
        raise RecipeError(
            f"{model.source.given}: {model.memory.note}; it cannot write the text for "
            f"{written} itself: give calibration.source: file (or dataset) and evaluate.text"
        )
    calibration, evaluation = texts(
        recipe.calibration,
        recipe.evaluate,
        model.model if written else None,
        model.tokenizer,
        job.reporter.progress,
        job.reporter.note,
    )
    save_file({"calibration": calibration, "evaluation": evaluation}, path)


def _factors(job: Job, model: ModelUnderWork, tokens: Path, folder: Path, stage_key: str) -> None:
    """Files of finished blocks are kept if they were made from the same inputs."""
    mark = folder / "key"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != stage_key:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(mark, stage_key)
    write_atomic(job.work / MEMORY, model.memory.note)
    job.reporter.note(model.memory.note)
    samples = load_file(tokens)["calibration"]
    done = finished_blocks(job.recipe, model.structure, folder)
    if done:
        job.reporter.note(f"{len(done)} of {len(model.structure.blocks)} blocks are done already")
    job.ranks.order({"do": "factors", "finished": done, "tokens": list(samples.shape)})
    _share(job, model, samples, folder, done)
    job.ranks.finished()


def share_factors(job: Job, model: ModelUnderWork, order: dict[str, Any]) -> None:
    """The stage "factors" on a rank other than 0, as rank 0 ordered it."""
    samples = torch.zeros(order["tokens"], dtype=torch.int64)
    _share(job, model, samples, job.work / "factors", order["finished"])


def _share(
    job: Job, model: ModelUnderWork, tokens: Tensor, folder: Path, finished: list[int]
) -> None:
    weights = model.weights
    torch.set_num_threads(max(1, job.threads // job.ranks.local_size))
    factorize_blocks(
        job.recipe,
        model.structure,
        weights,
        job.ranks.broadcast(tokens),
        folder,
        job.reporter,
        finished,
        job.ranks,
    )
    torch.set_num_threads(job.threads)


def _allocate(
    job: Job, model: ModelUnderWork, factors: Path, more: dict[str, dict[str, Any]]
) -> list[compress.GroupPlan]:
    """Ranks, for a share of the parameters or for a speedup."""
    recipe, structure = job.recipe, model.structure
    budget = recipe.compress.budget
    if budget is None or budget.speedup is None:
        return compress.allocate_ranks(recipe, structure, factors, more)
    torch.set_num_threads(job.threads)
    speed = speed_budget.measure(chosen_groups(recipe, structure), structure)
    plan = compress.allocate_ranks(recipe, structure, factors, more, speed)
    reached = speed.speedup({entry.group.leader: entry.allocation for entry in plan})
    job.reporter.note(
        f"budget speedup {budget.speedup:g}: predicted {reached:.2f} for one token, from the times "
        "of its products in float32 on this machine; what the files gain is measured below"
    )
    return plan


def _assemble(
    job: Job,
    model: ModelUnderWork,
    tokens: Path,
    factors: Path,
    plan_file: Path,
    checkpoint: Path,
) -> None:
    recipe, structure = job.recipe, model.structure
    more: dict[str, dict[str, Any]] = {}
    if STRATEGIES[recipe.compress.allocate].measure is not None:
        text = load_file(tokens)["calibration"]
        more = measured(recipe, structure, factors, model.model, text, job.reporter.progress)
    if recipe.compress.by_bytes:
        plan = allocate_bytes(job, model, factors, load_file(tokens)["calibration"])
    else:
        plan = _allocate(job, model, factors, more)
    low_rank = compress.low_rank_of(plan, structure)
    embedding = compress.embedding_of(plan, structure)
    shutil.rmtree(checkpoint, ignore_errors=True)
    config = both_rope_forms(compressed_config(model.checkpoint.config, low_rank, embedding))
    if recipe.compress.sequential and not recipe.compress.by_bytes:  # else with the types' noise
        text = load_file(tokens)["calibration"]
        made = refactor_in_sequence(
            recipe, model.weights, structure, plan, text, factors, job.reporter.progress
        )
        replaced = fitted_dense(model.weights.model, plan)
    else:
        made = compress.pair_tensors(job.recipe.compress, plan, factors)
        replaced = []
    if embedding is not None:
        replaced += [name for name in (embedding.name, embedding.tied_head) if name]
    tensors = assembled(model.checkpoint, low_rank, made, replaced)
    write_checkpoint(checkpoint, model.source.folder, config, tensors)
    compress.save_plan(plan, plan_file)
    weights = compress.mixed_importance(plan, importance(model.structure, factors))
    save_file(weights, job.work / IMPORTANCE)
    trouble = list(moment_trouble(model.structure, factors))
    write_atomic(job.work / TROUBLE, json.dumps(trouble))
    for line in (*compress.strategy(plan), *trouble):
        job.reporter.note(line)
