"""The whole pipeline of one recipe: compress, export, check, measure, judge, publish."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from safetensors.numpy import load_file, save_file

from svdexport.core.machine import describe
from svdexport.core.measures import (
    ArtifactSpeed,
    Embeddings,
    GateResult,
    Measured,
    Quality,
    Verdict,
)
from svdexport.files import sha256_file
from svdexport.pipeline.artifacts import Artifact, evidence_file, export_all
from svdexport.pipeline.factors import statistics
from svdexport.pipeline.inputs import versions
from svdexport.pipeline.job import Job, ModelUnderWork
from svdexport.pipeline.measure import (
    SPEED_RUNTIME,
    artifact_key,
    measure_embeddings,
    measure_quality,
    measure_speed,
)
from svdexport.pipeline.plain import export_plain
from svdexport.pipeline.quantize import quantize_exports
from svdexport.pipeline.refine import refine_seeds
from svdexport.pipeline.stages import MEMORY, TROUBLE, Compressed, run_compression
from svdexport.recipe import Recipe, canonical_json, recipe_hash
from svdexport.report import card, html, manifest, markdown
from svdexport.report.equal_bytes import comparisons
from svdexport.report.result import (
    ArtifactResult,
    PlanRow,
    RunResult,
    SourceModel,
    StageTime,
    TensorHash,
)
from svdexport.safety import check_model_folder
from svdexport.verify import evidence
from svdexport.verify.gate import judge


@dataclass(frozen=True)
class Invocation:
    """How a run was asked for, for the manifest: the recipe's text, overrides, command line."""

    recipe_text: str
    overrides: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Outcome:
    """A run's result and, where its gates passed, the folder that now stands there."""

    result: RunResult
    out: Path | None


def run(job: Job, invocation: Invocation) -> Outcome:
    """Run all stages. Files appear under the final name only where every gate passed."""
    model = ModelUnderWork(job)
    job.rundir.staging.mkdir(exist_ok=True)
    compressed = run_compression(job, model)
    quantized = quantize_exports(job, model, compressed)
    artifacts = export_all(job, model, compressed.checkpoint, quantized.key, quantized.folders)
    intact = not any(artifact.problems for artifact in artifacts)
    quality: dict[str, Quality] = {}
    embeddings: dict[str, Embeddings] = {}
    speed: dict[str, ArtifactSpeed] = {}
    if intact:  # figures taken on a broken file mean nothing
        artifacts += export_plain(job, model, [a for a in artifacts if a.role == "compressed"])
        quality = measure_quality(job, model, artifacts)
        embeddings = measure_embeddings(job, model, artifacts)
        speed = measure_speed(job, artifacts)
    gates, verdict = judge(job.recipe.gates, _measured(artifacts, quality, embeddings, speed))
    results = tuple(
        dataclasses.replace(
            _artifact_result(job, a, quality, speed), embeddings=embeddings.get(artifact_key(a))
        )
        for a in artifacts
    )
    result = _result(job, model, invocation, compressed, results, gates, verdict)
    if verdict.word != "pass":
        write_reports(result, fresh(job.work / "report"))
        return Outcome(result, None)
    keep_evidence(job, artifacts)
    write_reports(result, job.rundir.staging)
    out = job.rundir.publish()
    clean(job.work)
    return Outcome(result, out)


def keep_evidence(job: Job, artifacts: list[Artifact]) -> None:
    """Put what `verify` repeats parity and quality from into the folder to be published."""
    folder = fresh(job.rundir.staging / evidence.FOLDER)
    tokens = load_file(job.work / "tokens.safetensors")["evaluation"]
    save_file({"evaluation": tokens}, folder / evidence.EVALUATION)
    for artifact in artifacts:
        if artifact.role == "compressed" and artifact.parity is not None:
            there = evidence.path_of(job.rundir.staging, artifact.path.name)
            shutil.copyfile(evidence_file(job, artifact.path), there)


def clean(work: Path) -> None:
    """Drop the large intermediate files of a finished run."""
    made = ("factors", "checkpoint", "refine", "refined", "quantized", "base", "dense", "plain")
    for name in (*made, "source", "reference", "out"):
        shutil.rmtree(work / name, ignore_errors=True)


def write_reports(result: RunResult, folder: Path) -> None:
    """README.md (model card), report.html, summary.md, and manifest.json, which lists them all."""
    card.write(result, folder)
    html.write(result, folder)
    markdown.write(result, folder)
    manifest.write(result, folder)


def fresh(folder: Path) -> Path:
    """The folder, made anew and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _measured(
    artifacts: list[Artifact],
    quality: dict[str, Quality],
    embeddings: dict[str, Embeddings],
    speed: dict[str, ArtifactSpeed],
) -> list[Measured]:
    """What the gates judge. Of the dense twins only that their files are sound."""
    judged = []
    for artifact in artifacts:
        name = artifact_key(artifact)
        if artifact.role != "compressed":
            if artifact.problems:
                judged.append(
                    Measured(name, 0, parity=artifact.parity, round_trip=artifact.round_trip)
                )
            continue
        judged.append(
            Measured(
                artifact.path.name,
                artifact.exported.bytes,
                quality.get(name),
                speed.get(name),
                artifact.parity,
                artifact.round_trip,
                embeddings.get(name),
                artifact.exported.format != "checkpoint",
            )
        )
    return judged


def _artifact_result(
    job: Job, artifact: Artifact, quality: dict[str, Quality], speed: dict[str, ArtifactSpeed]
) -> ArtifactResult:
    exported, name = artifact.exported, artifact_key(artifact)
    kept = artifact.role == "compressed"
    tensors = {
        key: TensorHash(record.shape, record.type, record.nbytes, record.sha256)
        for key, record in exported.tensors.items()
    }
    return ArtifactResult(
        path=artifact.path.name if kept else name,
        format=exported.format,
        type=exported.type,
        role=artifact.role,
        runtime=speed[name].runtime if name in speed else SPEED_RUNTIME[exported.format],
        bytes=exported.bytes,
        quality=quality.get(name),
        speed=speed.get(name),
        parity=artifact.parity,
        round_trip=artifact.round_trip,
        notes=exported.notes,
        files=artifact.files,
        tensors=tensors,
        kept=kept,
    )


def _result(
    job: Job,
    model: ModelUnderWork,
    invocation: Invocation,
    compressed: Compressed,
    artifacts: tuple[ArtifactResult, ...],
    gates: tuple[GateResult, ...],
    verdict: Verdict,
) -> RunResult:
    recipe = job.recipe
    return RunResult(
        name=job.rundir.out.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=invocation.command,
        recipe=json.loads(canonical_json(recipe)),
        recipe_text=invocation.recipe_text,
        recipe_sha256=recipe_hash(recipe),
        source=source_model(model),
        plan=compressed.plan,
        artifacts=artifacts,
        gates=gates,
        verdict=verdict,
        stages=tuple(StageTime(*stage) for stage in job.reporter.stages),
        versions=versions(),
        machine=describe(),
        seeds={"calibration": recipe.calibration.seed, **refine_seeds(recipe)},
        threads=job.threads,
        evaluation_text=str(recipe.evaluate.text or "held-out text that the model wrote itself"),
        overrides=invocation.overrides,
        equal_bytes=comparisons(artifacts),
        notes=(
            *plan_notes(compressed.plan),
            *embedding_notes(artifacts),
            *moment_notes(job, compressed),
            *damping_notes(recipe),
            *json.loads((job.work / TROUBLE).read_text(encoding="utf-8")),
            *compressed.notes,
            (job.work / MEMORY).read_text(encoding="utf-8"),
        ),
    )


def source_model(model: ModelUnderWork) -> SourceModel:
    """Name, architecture, size, licence and hashes of what the user gave."""
    source = model.source
    given = [source.gguf] if source.gguf else sorted(source.folder.glob("*.safetensors"))
    config = model.checkpoint.config
    tensors = check_model_folder(source.folder, source.trust_remote_code).tensors
    params = sum(math.prod(info.shape) for info in tensors.values())
    return SourceModel(
        name=given_name(source.given),
        architecture=(config.get("architectures") or ["unknown"])[0],
        params=params,
        license=_license(source.folder),
        base_model=hub_name(model.job.recipe, source.given),
        files={path.name: sha256_file(path) for path in given},
    )


def given_name(model: Path) -> str:
    """A model's name as it was given, not a link's target: a cache has names of its own."""
    return model.name if model.name not in ("", "..") else model.resolve().name


def hub_name(recipe: Recipe, given: Path) -> str:
    """``owner/name`` on the Hugging Face Hub: as the recipe says, or as a hub cache's path does."""
    if recipe.model.hub_name:
        return recipe.model.hub_name
    for part in given.resolve().parts:
        found = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part)
        if found:
            return f"{found[1]}/{found[2]}"
    return ""


def _license(folder: Path) -> str:
    """The ``license`` of the folder's model card, or nothing."""
    card_file = folder / "README.md"
    if not card_file.is_file():
        return ""
    text = card_file.read_text(encoding="utf-8", errors="replace")
    head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:\s*(\S+)\s*$", head, re.MULTILINE)
    return found[1] if found else ""


def moment_notes(job: Job, compressed: Compressed) -> tuple[str, ...]:
    """How many moments cannot have full rank, since calibration has fewer tokens than inputs."""
    if "inputs" not in statistics(job.recipe):
        return ()
    tokens = load_file(compressed.tokens)["calibration"].size
    starved = sum(row.shape[1] > tokens for row in compressed.plan)
    if not starved:
        return ()
    return (
        f"{starved} linears have more inputs than calibration has tokens ({tokens}): the moments "
        "of their inputs are singular; give more calibration.samples",
    )


def damping_notes(recipe: Recipe) -> tuple[str, ...]:
    """Whether a damping was asked for that the method does not read."""
    if "damping" not in recipe.compress.model_fields_set or "gradients" in statistics(recipe):
        return ()
    return (
        "compress.damping is added to moments of output gradients; method "
        f"{recipe.compress.method} uses none and does not read it",
    )


def embedding_notes(artifacts: tuple[ArtifactResult, ...]) -> Iterator[str]:
    """What became of an encoder's embeddings."""
    for artifact in artifacts:
        found = artifact.embeddings
        if found is not None:
            order = found.rank_correlation
            told = "" if order is None else f", rank correlation of similarities {order:.4f}"
            yield (
                f"{artifact.label}, {artifact.role}: cosine to the dense model's embeddings "
                f"{found.mean_cosine:.4f} (5 % quantile {found.low_cosine:.4f}){told}, over "
                f"{found.texts} texts of {found.tokens} tokens"
            )


def plan_notes(plan: tuple[PlanRow, ...]) -> tuple[str, ...]:
    """How many linears became pairs, what was kept, and why linears stayed dense."""
    pairs = [row for row in plan if row.rank is not None]
    kept = sum(row.params for row in plan) / sum(row.params_dense for row in plan)
    notes = [
        f"{len(pairs)} of {len(plan)} linears are pairs; {kept:.1%} of their parameters are kept "
        f"({1 - kept:.1%} removed)"
    ]
    reasons: dict[str, int] = {}
    for row in plan:
        if row.rank is None:
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
    notes += [f"{count} linears stay dense: {reason}" for reason, count in reasons.items()]
    return tuple(notes)
