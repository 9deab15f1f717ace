"""Measuring and looking at any artifact, outside of a run: eval, bench, inspect."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from svdexport.checkpoint import Checkpoint, is_encoder
from svdexport.core.measures import SpeedSettings
from svdexport.errors import InputError, RecipeError
from svdexport.models.corpus import read_text
from svdexport.pipeline.reporter import Reporter
from svdexport.runtimes import open_runtime
from svdexport.runtimes.artifact import kind, size_bytes
from svdexport.runtimes.encoder_rt import is_encoder_graph
from svdexport.safety.model_folder import check_model_folder


def evaluate_artifact(
    artifact: Path,
    text: Path,
    reference: Path | None,
    context: int,
    windows: int | None,
    runtime: str | None,
    threads: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """``eval``: keys ``perplexity, tokens, mean_kld, same_top`` and the rest of Quality."""
    from svdexport.verify.quality import evaluate
    from svdexport.verify.quality import windows as cut
    from svdexport.verify.reference import ReferenceLogits

    for path in (artifact, reference):
        if path is not None and _is_encoder(path):
            raise InputError(
                f"{path}: an encoder predicts no next token, so it has no perplexity; a recipe's "
                "report compares its embeddings"
            )
    words = read_text(text)
    with contextlib.ExitStack() as stack:
        reporter_stage = stack.enter_context(reporter.stage(f"eval {artifact}"))
        del reporter_stage
        candidate = checked_runtime(artifact, threads, context, runtime)
        stack.callback(candidate.close)
        tokens = candidate.tokenize(words)
        cutout = cut(tokens, context, windows or max(1, len(tokens) // context))
        source = None
        if reference is not None:
            other = checked_runtime(reference, threads, context, None)
            stack.callback(other.close)
            if other.tokenize(words[:10000]) != candidate.tokenize(words[:10000]):
                raise InputError(f"{reference}: its tokenizer differs from that of {artifact}")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdexport-")))
            source = ReferenceLogits.of(other, cutout, folder)
        found = evaluate(
            candidate,
            cutout,
            source,
            progress=lambda done, total: reporter.progress("windows", done, total),
        )
    result = dataclasses.asdict(found)
    head = {"artifact": str(artifact), "runtime": candidate.name, "text": str(text)}
    return head | {key: value for key, value in result.items() if key != "generations"}


def bench_artifacts(
    paths: list[Path],
    rounds: int,
    prefill: tuple[int, ...],
    decode: int,
    runtime: str | None,
    threads: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """``bench``: SpeedReport as a dictionary; the first path is the baseline.

    An encoder writes no text: where one is among the artifacts, prefill alone is timed.
    """
    from svdexport.verify.speed import measure

    if len(paths) < 1:
        raise RecipeError("bench: name at least one artifact")
    context = max(*prefill, 2 * decode) + 64
    with contextlib.ExitStack() as stack:
        stack.enter_context(reporter.stage("bench"))
        runtimes = []
        for path in paths:
            name = runtime or ("onnxruntime-genai" if _is_genai(path) else None)
            opened = checked_runtime(path, threads, context, name)
            stack.callback(opened.close)
            runtimes.append(opened)
        steps = 0 if any(map(_is_encoder, paths)) else decode
        settings = SpeedSettings(threads, rounds, prefill, steps)
        report = measure(runtimes, settings, reporter.progress)
    return dataclasses.asdict(report)


def _is_genai(path: Path) -> bool:
    return path.is_dir() and (path / "genai_config.json").exists()


def _is_encoder(path: Path) -> bool:
    form = kind(path)
    if form == "onnx":
        return path.is_dir() and is_encoder_graph(path)
    return form == "checkpoint" and is_encoder(Checkpoint.open(path).config)


def checked_runtime(path: Path, threads: int, context: int, name: str | None) -> Any:
    """Open an artifact after the safety checks of its kind."""
    if kind(path) == "checkpoint":
        check_model_folder(path)
    return open_runtime(path, threads=threads, context=context, runtime=name)


def inspect_artifact(path: Path) -> dict[str, Any]:
    """Format, layers with form, rank, type and bytes, totals, needed runtime."""
    form = kind(path)
    if form == "gguf":
        from svdexport.runtimes.inspect_gguf import inspect as inspect_gguf

        return inspect_gguf(path)
    if form == "onnx":
        from svdexport.runtimes.inspect_onnx import inspect as inspect_onnx

        return inspect_onnx(path)
    return _inspect_checkpoint(path)


def _inspect_checkpoint(path: Path) -> dict[str, Any]:
    check_model_folder(path)
    checkpoint = Checkpoint.open(path)
    linears = [
        {"name": name, "form": "pair" if spec.group == name else "shared pair", "rank": spec.rank}
        for name, spec in checkpoint.low_rank.items()
    ]
    return {
        "format": "checkpoint",
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "path": str(path),
        "bytes": size_bytes(path),
        "linears": linears,
        "runtime": "transformers with svdexport imported" if linears else "transformers",
    }
