"""Measuring the written files: quality against the dense model, speed against the dense twin."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from svdexport.checkpoint import is_encoder
from svdexport.core.measures import ArtifactSpeed, Embeddings, Quality, SpeedReport, SpeedSettings
from svdexport.files import write_atomic
from svdexport.models.loader import Source
from svdexport.pipeline.artifacts import Artifact
from svdexport.pipeline.inputs import versions
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import CheckpointExport, Export, Recipe
from svdexport.runtimes import open_runtime
from svdexport.runtimes.encoder_rt import EncoderRuntime, is_encoder_graph
from svdexport.runtimes.sentence import SentenceEncoder, pooling_of
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.verify.embeddings import Embed, compare, embed_all
from svdexport.verify.generation import generate
from svdexport.verify.quality import evaluate
from svdexport.verify.reference import ReferenceLogits
from svdexport.verify.speed import measure

_QUALITIES = TypeAdapter(dict[str, Quality])
GENERATION_CONTEXT = 128  # tokens of a prompt and its continuation
SPEED_RUNTIME = {"gguf": "llama.cpp", "onnx": "onnxruntime-genai", "checkpoint": "torch"}


def artifact_key(artifact: Artifact) -> str:
    """Name of an artifact among the results of a run."""
    return f"{artifact.role}/{artifact.path.name}"


def measure_quality(
    job: Job, model: ModelUnderWork, artifacts: list[Artifact]
) -> dict[str, Quality]:
    """Perplexity, divergence from the dense float32 model, and greedy text of each artifact."""
    if is_encoder(model.checkpoint.config):
        return {}  # no next token to be surprised by; see measure_embeddings
    windows = load_file(job.work / "tokens.safetensors")["evaluation"]
    record = job.work / "quality.json"
    whose = [(a.role, a.files) for a in artifacts]
    stage_key = key(whose, windows.tolist(), versions())

    def make() -> None:
        folder = job.work / "reference"
        folder.mkdir(exist_ok=True)
        with model.weights.on_call() as whole:
            dense = TorchRuntime(model.source.folder, job.threads, whole)
            reference = ReferenceLogits.of(dense, windows, folder)
        model.release()
        found: dict[str, Quality] = {}
        for done, artifact in enumerate(artifacts):
            found[artifact_key(artifact)] = score(
                artifact.path,
                windows,
                reference,
                job.threads,
                job.recipe.calibration.seed,
                model.source.trust_remote_code,
            )
            job.reporter.progress("quality", done + 1, len(artifacts))
        write_atomic(record, _QUALITIES.dump_json(found))
        reference.path.unlink()  # gigabytes that nothing else reads

    job.stage("quality", stage_key, [record], make)
    return _QUALITIES.validate_json(record.read_bytes())


def measure_embeddings(
    job: Job, model: ModelUnderWork, artifacts: list[Artifact]
) -> dict[str, Embeddings]:
    """Of an encoder's artifacts: their embeddings of the evaluation text beside the dense ones."""
    if not is_encoder(model.checkpoint.config):
        return {}
    texts = load_file(job.work / "tokens.safetensors")["evaluation"]
    with job.reporter.stage("embeddings"), model.weights.on_call() as whole:
        meant = dense_embeddings(model.source.folder, whole, texts)
        return {
            artifact_key(artifact): score_embeddings(
                artifact.path, model.source, texts, meant, job.recipe, job.threads
            )
            for artifact in artifacts
        }


def dense_embeddings(folder: Path, model: Any, texts: np.ndarray) -> np.ndarray:
    """Embeddings (N, width) of texts (N, T) by the model in torch, pooled as its folder says."""
    return np.asarray(embed_all(torch_embed(folder, model), texts, str(folder)))


def torch_embed(folder: Path, model: Any) -> Embed:
    """Tokens -> embeddings of a model in memory, pooled as the folder says."""
    encoder = SentenceEncoder(model, pooling_of(folder))

    def embed(tokens: np.ndarray) -> np.ndarray:
        ids = torch.as_tensor(tokens)
        with torch.no_grad():
            found: np.ndarray = encoder(ids, torch.ones_like(ids))[1].float().numpy()
        return found

    return embed


def score_embeddings(
    path: Path, source: Source, texts: np.ndarray, meant: np.ndarray, recipe: Recipe, threads: int
) -> Embeddings:
    """Embeddings of an artifact beside those of the dense model."""
    trusted = source.trust_remote_code
    context = texts.shape[1]
    runtime = open_runtime(path, threads=threads, context=context, trust_remote_code=trusted)
    try:
        if isinstance(runtime, EncoderRuntime):
            run = runtime
            found = embed_all(lambda t: run.embed(t, np.ones_like(t)), texts, str(path))
        else:
            assert isinstance(runtime, TorchRuntime)
            found = embed_all(torch_embed(source.folder, runtime.model), texts, str(path))
    finally:
        runtime.close()
    return compare(meant, found, texts.shape[1], recipe.calibration.seed)


def score(
    path: Path, windows: np.ndarray, reference: Any, threads: int, seed: int, trusted: bool
) -> Quality:
    """Quality of an artifact on windows (W, T) of tokens, and what it writes.

    ``trusted``: whether a checkpoint's own code may run.
    """
    context = max(windows.shape[1], GENERATION_CONTEXT)
    runtime = open_runtime(path, threads=threads, context=context, trust_remote_code=trusted)
    try:
        quality = evaluate(runtime, windows, reference, seed=seed)
        return dataclasses.replace(quality, generations=generate(runtime))
    finally:
        runtime.close()


def measure_speed(job: Job, artifacts: list[Artifact]) -> dict[str, ArtifactSpeed]:
    """Each compressed artifact, and its plain rival, against its dense twin, timed in turn on the
    same runtime."""
    found: dict[str, ArtifactSpeed] = {}
    compressed = [a for a in artifacts if a.role == "compressed"]
    for artifact in compressed:
        if isinstance(artifact.spec, CheckpointExport):
            continue  # no deployment runtime, and its dense twin is the user's own folder
        twin = next(a for a in artifacts if a.role == "dense" and a.spec == artifact.spec)
        group = [twin, artifact]
        if job.recipe.baselines.plain == "full":
            group += [a for a in artifacts if a.role == "plain" and a.spec == artifact.spec]
        report = time_side_by_side(
            job.recipe, artifact.spec, [a.path for a in group], job.threads, job.reporter
        )
        found |= dict(zip(map(artifact_key, group), report.artifacts, strict=True))
    return found


def time_side_by_side(
    recipe: Recipe, spec: Export, paths: list[Path], threads: int, reporter: Reporter
) -> SpeedReport:
    """Artifacts of one format in turn; the first is the baseline.

    Never taken from an earlier run: a speed belongs to the moment it was measured in.
    """
    settings = recipe.speed
    context = max(*settings.prefill, settings.decode * 2) + 64
    encoder = spec.format == "onnx" and is_encoder_graph(paths[-1])
    name = SPEED_RUNTIME[spec.format]
    if name == "onnxruntime-genai" and not all(
        (path / "genai_config.json").is_file() for path in paths
    ):
        name = "onnxruntime"  # an encoder, or a latent cache
    wanted = SpeedSettings(
        threads,
        settings.rounds,
        settings.prefill,
        0 if encoder else settings.decode,
        recipe.calibration.seed,
    )
    with reporter.stage(f"speed {paths[1].name}"), contextlib.ExitStack() as stack:
        runtimes = []
        for path in paths:
            opened = open_runtime(path, threads=threads, context=context, runtime=name)
            stack.callback(opened.close)
            runtimes.append(opened)
        return measure(runtimes, wanted, reporter.progress)
