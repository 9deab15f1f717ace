"""The library's face: what the command line does, as functions.

Inputs are checked before torch and the runtimes are imported: a wrong one is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdexport.core.machine import no_garbage_collection
from svdexport.errors import ArtifactError, RecipeError
from svdexport.pipeline.preflight import check_artifact, check_inputs, check_text
from svdexport.pipeline.recheck import recheck
from svdexport.pipeline.reporter import Reporter
from svdexport.pipeline.start import protected, started
from svdexport.recipe import load_recipe, recipe_hash
from svdexport.rundir import resource_errors
from svdexport.safety import check_config, check_gguf

if TYPE_CHECKING:
    from torch import Tensor

    from svdexport.pipeline.draft import Target
    from svdexport.pipeline.repeat import Repeat
    from svdexport.pipeline.run import Outcome
    from svdexport.report.comparison import Comparison
    from svdexport.report.result import PlanRow, RunResult

__all__ = [
    "bench",
    "compare",
    "compress",
    "compress_model",
    "evaluate",
    "export",
    "frontier",
    "init",
    "inspect",
    "plan",
    "report",
    "run",
    "verify",
]


def run(
    recipe: Path | str,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    reporter: Reporter | None = None,
    command: str = "",
) -> Outcome:
    """Run a recipe from model to verdict; resumes an unfinished run of the same recipe.

    Args:
        recipe: the YAML file. out: output folder (default: ``out/<recipe's name>``).
        overrides: ``key=value`` as of ``--set``.

    Returns: the result, and the published folder where every gate passed.

    Raises:
        RecipeError, InputError, ResourceError: see ``svdexport.errors``.
    """
    path = Path(recipe)
    with started(path, out, overrides, restart, reporter) as job:
        from svdexport.pipeline.run import Invocation, Outcome
        from svdexport.pipeline.run import run as run_job

        if job.rundir.published:
            found = recheck(job.rundir.out)
            if found.recipe_sha256 == recipe_hash(job.recipe):
                job.reporter.note(f"{job.rundir.out} is there already; --restart runs it anew")
                return Outcome(found, job.rundir.out)
        text = path.read_text(encoding="utf-8", errors="replace")
        return run_job(job, Invocation(text, tuple(overrides), command))


def compress(
    recipe: Path | str,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    reporter: Reporter | None = None,
) -> Path:
    """The stages up to the compressed checkpoint, whose folder (float32 factors) is returned."""
    with started(Path(recipe), out, overrides, False, reporter, timed=False) as job:
        from svdexport.pipeline.job import ModelUnderWork
        from svdexport.pipeline.stages import run_compression

        return run_compression(job, ModelUnderWork(job)).checkpoint


def compress_model(
    model: Any,
    tokens: Tensor,
    *,
    param_ratio: float = 0.8,
    method: str = "kfac_svd",
    allocate: str = "greedy",
    batch: int = 8,
    reporter: Reporter | None = None,
    **settings: Any,
) -> tuple[PlanRow, ...]:
    """Replace the linears of a model in memory, in place, by low-rank pairs y = B (A x).

    Args:
        model: a causal language model of transformers, on the CPU in float32; training or not, as
            it is given, so it comes back.
        tokens: calibration text, token ids (windows, length).
        param_ratio: kept share of the parameters of the factorised linears.
        settings: further keys of a recipe's ``compress`` section (group, targets, ignore,
            rank_multiple, damping).

    Returns:
        the plan: for each linear its rank, or why it stayed dense.

    Raises:
        RecipeError: a setting or the weights' type is wrong. InputError: the model's structure
            cannot be found.
    """
    from svdexport.pipeline.in_memory import compress_in_memory

    budget = {"param_ratio": param_ratio}
    every = {"method": method, "allocate": allocate, "budget": budget} | settings
    return compress_in_memory(model, tokens, every, batch, reporter or Reporter(quiet=True))


def export(
    recipe: Path | str,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    reporter: Reporter | None = None,
) -> list[Path]:
    """The stages up to the exported and checked files, left in the run's staging folder."""
    with started(Path(recipe), out, overrides, False, reporter, timed=False) as job:
        from svdexport.pipeline.artifacts import export_all
        from svdexport.pipeline.job import ModelUnderWork
        from svdexport.pipeline.quantize import quantize_exports
        from svdexport.pipeline.stages import run_compression

        model = ModelUnderWork(job)
        job.rundir.staging.mkdir(exist_ok=True)
        compressed = run_compression(job, model)
        quantized = quantize_exports(job, model, compressed)
        artifacts = export_all(job, model, compressed.checkpoint, quantized.key, quantized.folders)
        for artifact in artifacts:
            if artifact.problems:
                raise ArtifactError(f"{artifact.path}: {artifact.problems[0]}")
        return [artifact.path for artifact in artifacts if artifact.role == "compressed"]


def frontier(
    recipe: Path | str,
    budgets: Sequence[int],
    out: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    plain: Sequence[str] = (),
    speed: bool = True,
    reporter: Reporter | None = None,
) -> Path:
    """Files of several sizes beside llama.cpp's plain types, measured; the folder they are in.

    Args:
        budgets: bytes of each file. plain: llama.cpp's mixes, such as ``Q4_K_M``; without them
            the usual ones.
        speed: also time them, against llama.cpp's Q4_0.

    Raises:
        RecipeError: the recipe has no budget in bytes, or the output exists already.
    """
    place = out or Path("out") / f"{Path(recipe).stem}-frontier"
    if place.exists():
        raise RecipeError(f"{place}: exists already; move it away, or give another --out")
    with started(Path(recipe), place, overrides, False, reporter, timed=speed) as job:
        from svdexport.pipeline.frontier import frontier as find
        from svdexport.pipeline.frontier import publish

        return publish(job, find(job, budgets, plain, speed), place)


def plan(recipe: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe would do, from headers alone: ranks, bytes, memory. No weights are read."""
    checked = load_recipe(Path(recipe), overrides)
    check_inputs(checked, weights=False)
    with no_garbage_collection():  # a sixth of the time that importing torch takes
        from svdexport.pipeline.dryrun import dry_run

        return dry_run(checked)


def init(model: Path | str, target: Target, out: Path | str | None = None) -> Path:
    """Write a commented recipe for a model and a target (laptop, phone, browser, server).

    Args:
        out: the file; default: ``<model's name>-<target>.yaml`` in the current folder.

    Raises:
        RecipeError: the file is there already. InputError: the model is broken.
    """
    place = Path(model)
    if place.is_file():
        check_gguf(place)
    else:
        check_config(place)
    from svdexport.pipeline.draft import draft

    name = place.resolve().name.removesuffix(".gguf")
    return draft(place, target, Path(out or f"{name}-{target}.yaml"))


def verify(
    folder: Path | str,
    *,
    parity: bool = True,
    quality: bool = False,
    speed: bool = False,
    model: Path | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Repeat | None:
    """Is a published folder still what its manifest says, and does it compute and perform so here?

    Every file and every tensor is hashed, with independent readers; then the logits of each
    runtime are compared again with torch's. ``quality`` and ``speed`` measure the gates' figures
    anew on this machine.

    Args:
        parity: False for the hashes alone (None is returned).
        model: the source model's folder or GGUF, for quality and speed; default: where the recipe
            said, relative to the current folder.
        threads: for all runtimes; default: as in the run.
        trust_remote_code: whether Python code in the folder and in the source model may run,
            whatever the folder's manifest says.

    Raises:
        ArtifactError: files or tensors differ; the line names them.
        InputError: there is no manifest. RecipeError: the source model is not there.
    """
    place = Path(folder)
    result = recheck(place)
    if not (parity or quality or speed):
        return None
    from svdexport.pipeline.repeat import Wish, repeat

    wish = Wish(quality, speed, model, threads or result.threads or 1, trust_remote_code)
    with resource_errors(str(place), resumes=False):
        return repeat(place, result, wish, reporter or Reporter(quiet=True))


def report(folder: Path) -> RunResult:
    """Render a published folder's reports anew from its manifest. Raises InputError."""
    from svdexport.pipeline.run import write_reports

    result = recheck(folder)
    write_reports(result, folder)
    return result


def compare(
    recipe: Path | str,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    ratios: Sequence[float] = (0.8, 0.6, 0.4),
    labels: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Comparison:
    """All methods side by side on the same tokens: perplexity by torch at each kept ratio.

    Writes ``compare.json``, ``compare.md`` and ``compare.svg`` into ``out`` (default:
    ``out/compare-<recipe's name>``).

    Args:
        recipe: model, texts and the keys of ``compress`` that the methods share.
        labels: methods to compare, as ``svdexport.pipeline.compare`` names them; empty for all.
    """
    path = Path(recipe)
    checked = load_recipe(path, overrides)
    if not ratios or not all(0.0 < ratio <= 1.0 for ratio in ratios):
        raise RecipeError(f"compare: kept ratios must lie in (0, 1], not {list(ratios)}")
    check_inputs(checked)
    place = out or Path("out") / f"compare-{path.stem}"
    if place.exists() and not place.is_dir():
        raise RecipeError(f"--out {place}: there is a file of this name; name a folder")
    for item in map(Path.resolve, protected(checked)):
        if item in (place.resolve(), *place.resolve().parents):
            raise RecipeError(f"--out {place}: lies in the input {item}; name another folder")
    from svdexport.pipeline.compare import compare as run_comparison
    from svdexport.pipeline.job import default_threads

    threads = checked.speed.threads or default_threads()
    with resource_errors(str(place)):
        return run_comparison(
            checked, ratios, labels, place, threads, reporter or Reporter(quiet=True)
        )


def evaluate(
    artifact: Path,
    text: Path,
    *,
    reference: Path | None = None,
    context: int = 1024,
    windows: int | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Perplexity of any artifact on a text, and its divergence from a reference artifact.

    Windows are consecutive, without overlap and without a begin token.
    """
    check_text(text, "--text")
    for path in (artifact, reference):
        if path is not None:
            check_artifact(path)
    from svdexport.pipeline.job import default_threads
    from svdexport.pipeline.tools import evaluate_artifact

    with resource_errors(str(artifact), resumes=False):
        return evaluate_artifact(
            artifact,
            text,
            reference,
            context,
            windows,
            runtime,
            threads or default_threads(),
            reporter or Reporter(quiet=True),
        )


def bench(
    artifacts: Sequence[Path],
    *,
    baseline: Path | None = None,
    rounds: int = 9,
    prefill: Sequence[int] = (128, 512),
    decode: int = 64,
    runtime: str | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Time artifacts in turn; the first is the baseline unless one is named.

    Of an encoder ``prefill`` alone.
    """
    paths = [baseline, *artifacts] if baseline is not None else list(artifacts)
    for path in paths:
        check_artifact(path)
    from svdexport.pipeline.job import default_threads
    from svdexport.pipeline.tools import bench_artifacts

    with resource_errors("bench", resumes=False):
        return bench_artifacts(
            paths,
            rounds,
            tuple(prefill),
            decode,
            runtime,
            threads or default_threads(),
            reporter or Reporter(quiet=True),
        )


def inspect(artifact: Path) -> dict[str, Any]:
    """What an artifact holds, layer by layer, and which runtime it needs. Headers only."""
    check_artifact(artifact)
    from svdexport.pipeline.tools import inspect_artifact

    return inspect_artifact(artifact)
