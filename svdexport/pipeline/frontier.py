"""``svdexport frontier``: files of several sizes, measured beside llama.cpp's plain types."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from svdexport.checkpoint import Checkpoint
from svdexport.core.measures import Quality, SpeedSettings, Speedup
from svdexport.errors import ArtifactError, RecipeError
from svdexport.export import ExportRequest, exporter, gguf_base
from svdexport.export.gguf_importance import read_importance
from svdexport.export.gguf_plan import find_matches
from svdexport.files import write_atomic
from svdexport.pipeline.inputs import inputs_key
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.pipeline.quantize import quantize_exports
from svdexport.pipeline.run import clean
from svdexport.pipeline.stages import run_compression
from svdexport.recipe import GgufExport, recipe_hash
from svdexport.report.frontier import Point, page, pictures
from svdexport.runtimes import open_runtime
from svdexport.runtimes.ggml_quantize import MIXES, quantize_file
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.verify.quality import evaluate
from svdexport.verify.reference import ReferenceLogits
from svdexport.verify.speed import measure

PLAIN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")
SPEED_BASELINE = "Q4_0"
_QUALITY = TypeAdapter(Quality)


@dataclass(frozen=True)
class Frontier:
    """Points by falling size, and the folder of the files, table and pictures."""

    folder: Path
    points: tuple[Point, ...]


def frontier(job: Job, budgets: Sequence[int], plain: Sequence[str], speed: bool) -> Frontier:
    """Export each budget and each plain mix, measure the files, and write table and pictures.

    Without mixes: those of ``PLAIN``.

    Raises:
        RecipeError: the recipe has no budget in bytes, a mix is unknown, or speeds lack the mix
            that they are taken against.
    """
    if not job.recipe.compress.by_bytes:
        raise RecipeError("frontier needs a recipe with compress.budget: {bytes: ...}")
    plain = plain or PLAIN
    unknown = sorted(set(plain) - set(MIXES))
    if unknown:
        raise RecipeError(f"{unknown[0]}: not a plain type; one of {', '.join(MIXES)}")
    if speed and SPEED_BASELINE not in plain:
        raise RecipeError(
            f"speeds are taken against {SPEED_BASELINE}: add --plain {SPEED_BASELINE}, or give "
            f"--no-speed"
        )
    model = ModelUnderWork(job)
    folder = job.rundir.staging / "files"
    folder.mkdir(parents=True, exist_ok=True)
    files = {_name(budget): _ours(job, model, budget, folder) for budget in budgets}
    files |= {mix: _plain(job, model, mix, folder) for mix in plain}
    qualities = {name: _quality(job, model, path) for name, path in files.items()}
    speeds = _speeds(job, files) if speed else {}
    points = [
        Point(
            name,
            path.name,
            path.stat().st_size,
            name in MIXES,
            qualities[name].perplexity,
            qualities[name].mean_kld or 0.0,
            *speeds.get(name, (None, None)),
        )
        for name, path in files.items()
    ]
    points.sort(key=lambda point: -point.bytes)
    _write(job.rundir.staging, points)
    return Frontier(job.rundir.staging, tuple(points))


def _name(budget: int) -> str:
    return f"{budget / 1e6:g}MB"


def _ours(job: Job, model: ModelUnderWork, budget: int, folder: Path) -> Path:
    """The recipe's mixed export for one budget; calibration and factors are shared by all."""
    compress = job.recipe.compress
    assert compress.budget is not None
    changed = compress.model_copy(
        update={"budget": compress.budget.model_copy(update={"bytes": budget})}
    )
    recipe = job.recipe.model_copy(update={"compress": changed})
    spec = next(e for e in recipe.export if isinstance(e, GgufExport) and e.type == "mixed")
    recipe = recipe.model_copy(update={"export": (spec,)})
    out = folder / f"model-{_name(budget)}.gguf"

    def make() -> None:
        own = replace(job, recipe=recipe)
        compressed = run_compression(own, model)
        quantized = quantize_exports(own, model, compressed)
        source = model.source
        scratch = job.work / "base"
        request = ExportRequest(
            Checkpoint.open(compressed.checkpoint),
            source.folder,
            source.gguf,
            out,
            scratch,
            spec,
            quantized.folders[spec],
        )
        written = exporter("gguf").export(request)
        problems = exporter("gguf").check_round_trip(out, written.tensors)
        if problems:
            raise ArtifactError(f"{out.name}: {problems[0]}")

    stage_key = key(recipe_hash(recipe), inputs_key(recipe))
    job.stage(f"frontier {_name(budget)}", stage_key, [out], make)
    return out


def _plain(job: Job, model: ModelUnderWork, mix: str, folder: Path) -> Path:
    """llama.cpp's own file, with the importance matrix of the same calibration."""
    out, work, source = folder / f"model-{mix}.gguf", job.work / "base", model.source

    def make() -> None:
        base = gguf_base.prepare(source.folder, source.gguf, work)
        matches = find_matches(base, Checkpoint.open(source.folder), work)
        importance = read_importance(work, matches)
        named = {name: importance.of_tensor(name) for name in base.file.tensors}
        weights = {name: found for name, found in named.items() if found is not None}
        quantize_file(base.file.path, out, mix, job.threads, weights)

    stage_key = key(mix, job.recipe.calibration, inputs_key(job.recipe))
    job.stage(f"frontier {mix}", stage_key, [out], make)
    return out


def _quality(job: Job, model: ModelUnderWork, path: Path) -> Quality:
    """Against the dense float32 model, whose logits are computed once."""
    windows = load_file(job.work / "tokens.safetensors")["evaluation"]
    record = job.work / "frontier" / f"{path.name}.json"
    record.parent.mkdir(exist_ok=True)

    def make() -> None:
        found = _measured(job, model, path, windows)
        write_atomic(record, _QUALITY.dump_json(found))

    state = path.stat()
    stage_key = key(state.st_size, state.st_mtime_ns, windows.tolist(), inputs_key(job.recipe))
    job.stage(f"quality {path.name}", stage_key, [record], make)
    return _QUALITY.validate_json(record.read_bytes())


def _measured(job: Job, model: ModelUnderWork, path: Path, windows: np.ndarray) -> Quality:
    folder = job.work / "reference"
    folder.mkdir(exist_ok=True)
    dense = TorchRuntime(model.source.folder, job.threads, model.model)
    reference = ReferenceLogits.of(dense, windows, folder)
    runtime = open_runtime(path, threads=job.threads, context=windows.shape[1])
    try:
        return evaluate(runtime, windows, reference, seed=job.recipe.calibration.seed)
    finally:
        runtime.close()


def _speeds(job: Job, files: dict[str, Path]) -> dict[str, tuple[Speedup | None, Speedup | None]]:
    """(prefill, decode) of each file against llama.cpp's Q4_0, timed in turn with it."""
    recipe = job.recipe.speed
    context = max(*recipe.prefill, recipe.decode * 2) + 64
    wanted = SpeedSettings(
        job.threads, recipe.rounds, recipe.prefill, recipe.decode, job.recipe.calibration.seed
    )
    found: dict[str, tuple[Speedup | None, Speedup | None]] = {}
    for name, path in files.items():
        if name == SPEED_BASELINE:
            continue
        with job.reporter.stage(f"speed {name}"), contextlib.ExitStack() as stack:
            opened = []
            for one in (files[SPEED_BASELINE], path):
                opened.append(open_runtime(one, threads=job.threads, context=context))
                stack.callback(opened[-1].close)
            timed = measure(opened, wanted, job.reporter.progress).artifacts[1]
        found[name] = (timed.prefill_speedup, timed.decode_speedup)
    return found


def _write(folder: Path, points: Sequence[Point]) -> None:
    write_atomic(folder / "frontier.json", json.dumps([asdict(p) for p in points], indent=1))
    for name, svg in pictures(points).items():
        write_atomic(folder / name, svg)
    write_atomic(folder / "frontier.md", page(points))


def publish(job: Job, found: Frontier, out: Path) -> Path:
    """Move the finished folder to its place and drop what it was made from.

    Raises RecipeError where something stands there.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already; move it away, or give another --out")
    found.folder.rename(out)
    clean(job.work)
    return out
