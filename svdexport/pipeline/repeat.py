"""`verify` beyond hashes: parity, and on request quality and speed, again and on this machine.

Parity needs only the published folder: the logits of torch were kept there (`verify.evidence`),
and the tensors' hashes say that the file still holds the values they were computed from. Quality
and speed compare with the dense model, so they need the source model's folder or file; the dense
twins are written anew from it into a temporary folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from svdexport.checkpoint import Checkpoint, is_encoder
from svdexport.core.measures import (
    ArtifactSpeed,
    Embeddings,
    GateResult,
    Measured,
    Parity,
    Quality,
    Verdict,
)
from svdexport.errors import ArtifactError, InputError, RecipeError
from svdexport.export import ExportRequest, exporter
from svdexport.files import sha256_file
from svdexport.models.loader import Source, load_model, open_source
from svdexport.pipeline.artifacts import artifact_name, may_be_exact, parity_runtime
from svdexport.pipeline.measure import (
    dense_embeddings,
    score,
    score_embeddings,
    time_side_by_side,
)
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import CheckpointExport, Export, Gates, Model, Recipe, validate
from svdexport.report import manifest
from svdexport.report.result import ArtifactResult, RunResult
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.safety import check_config, check_safetensors
from svdexport.verify import evidence
from svdexport.verify.gate import judge
from svdexport.verify.parity import drowned, tolerance
from svdexport.verify.reference import ReferenceLogits

QUALITY_GATES = (
    *("max_perplexity_ratio", "max_mean_kld", "min_same_top"),
    *("min_cosine", "min_rank_correlation"),
)


@dataclass(frozen=True)
class Repeat:
    """What was measured again, by the artifact's path, and the gates' verdict on it."""

    parity: dict[str, Parity]
    quality: dict[str, Quality]
    embeddings: dict[str, Embeddings]
    speed: dict[str, ArtifactSpeed]
    gates: tuple[GateResult, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Wish:
    """What to repeat beyond parity; ``model`` is the source model, where it is elsewhere now.

    ``trust_remote_code``: whether code in the folder or in the source model may run. The manifest
    has no say in it: it comes with the folder.
    """

    quality: bool = False
    speed: bool = False
    model: Path | None = None
    threads: int = 1
    trust_remote_code: bool = False


def repeat(folder: Path, result: RunResult, wish: Wish, reporter: Reporter) -> Repeat:
    """Measure a folder that `recheck` found intact.

    Raises:
        RecipeError: the source model is needed and not found. InputError: it is another one.
        ArtifactError: the folder does not hold what a repeat needs.
    """
    recipe = validate(result.recipe, str(folder / manifest.NAME))
    kept = [a for a in result.artifacts if a.kept]
    with reporter.stage("parity"):
        parity = {}
        for done, artifact in enumerate(kept):
            parity[artifact.path] = _parity(folder, artifact, wish)
            reporter.progress("parity", done + 1, len(kept))
    quality: dict[str, Quality] = {}
    embeddings: dict[str, Embeddings] = {}
    speed: dict[str, ArtifactSpeed] = {}
    if wish.quality or wish.speed:
        with tempfile.TemporaryDirectory(prefix="svdexport-") as scratch:
            source = find_source(recipe, result, wish, Path(scratch))
            if wish.quality and is_encoder(Checkpoint.open(source.folder).config):
                embeddings = _embeddings(folder, kept, source, recipe, wish, reporter)
            elif wish.quality:
                quality = _quality(folder, kept, source, recipe, wish, reporter, Path(scratch))
            if wish.speed:
                speed = _speed(folder, kept, source, recipe, wish, reporter, Path(scratch))
    measured = [
        Measured(
            a.path,
            a.bytes,
            quality.get(a.path),
            speed.get(a.path),
            parity[a.path],
            (),
            embeddings.get(a.path),
            a.format != "checkpoint",
        )
        for a in kept
    ]
    gates, verdict = judge(repeated_gates(recipe.gates, wish), measured)
    return Repeat(parity, quality, embeddings, speed, gates, verdict)


def repeated_gates(gates: Gates, wish: Wish) -> Gates:
    """The gates whose figures are measured again, and those on bytes."""
    left_out: dict[str, None] = {}
    if not wish.quality:
        left_out |= dict.fromkeys(QUALITY_GATES)
    if not wish.speed:
        left_out |= dict.fromkeys(("min_prefill_speedup", "min_decode_speedup"))
    return gates.model_copy(update=left_out)


def _parity(folder: Path, artifact: ArtifactResult, wish: Wish) -> Parity:
    path = evidence.path_of(folder, artifact.path)
    kept = evidence.read(path)
    place, trusted = folder / artifact.path, wish.trust_remote_code
    if artifact.format == "checkpoint":
        check_config(place, trusted)
    exact = may_be_exact(place) and drowned(kept.logits, kept.rounded)
    runtime = parity_runtime(place, wish.threads, exact, trusted)
    try:
        if max(int(kept.tokens.max()), int(kept.columns.max())) >= runtime.vocab_size:
            raise ArtifactError(f"{path}: token ids beyond the vocabulary of {artifact.path}")
        logits = runtime.logits(kept.tokens)
    finally:
        runtime.close()
    return evidence.repeat(kept, logits, tolerance(artifact.format, artifact.type), exact)


def find_source(recipe: Recipe, result: RunResult, wish: Wish, work: Path) -> Source:
    """The source model: as wished, or where the recipe said. Its files must be those of the run.

    Raises RecipeError where it is not there, InputError where a file is another one.
    """
    place = wish.model or recipe.model.path or recipe.model.gguf
    assert place is not None
    if not place.exists():
        raise RecipeError(
            f"{place}: the source model is not there; name its folder or file with --model"
        )
    is_gguf = recipe.model.gguf is not None
    model = Model(
        path=None if is_gguf else place,
        gguf=place if is_gguf else None,
        trust_remote_code=wish.trust_remote_code,
    )
    for name, digest in result.source.files.items():
        file = place if is_gguf else place / name
        if not file.is_file() or sha256_file(file) != digest:
            raise InputError(f"{file}: not the file that the run was made from (sha256 {digest})")
    return open_source(model, work)


def _quality(
    folder: Path,
    kept: list[ArtifactResult],
    source: Source,
    recipe: Recipe,
    wish: Wish,
    reporter: Reporter,
    scratch: Path,
) -> dict[str, Quality]:
    windows = _evaluation(folder)
    found = {}
    with reporter.stage("quality"):
        model: Any = load_model(source.folder, source.trust_remote_code)
        dense = TorchRuntime(source.folder, wish.threads, model)
        reference = ReferenceLogits.of(dense, windows, scratch)
        del model, dense
        seed = recipe.calibration.seed
        for done, artifact in enumerate(kept):
            place = folder / artifact.path
            found[artifact.path] = score(
                place, windows, reference, wish.threads, seed, wish.trust_remote_code
            )
            reporter.progress("quality", done + 1, len(kept))
    return found


def _evaluation(folder: Path) -> Any:
    """The windows of tokens that the run evaluated on."""
    path = folder / evidence.FOLDER / evidence.EVALUATION
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, so that quality cannot be repeated; run again")
    check_safetensors(path)
    return load_file(path)["evaluation"]


def _embeddings(
    folder: Path,
    kept: list[ArtifactResult],
    source: Source,
    recipe: Recipe,
    wish: Wish,
    reporter: Reporter,
) -> dict[str, Embeddings]:
    texts = _evaluation(folder)
    with reporter.stage("embeddings"):
        model: Any = load_model(source.folder, source.trust_remote_code)
        meant = dense_embeddings(source.folder, model, texts)
        return {
            a.path: score_embeddings(folder / a.path, source, texts, meant, recipe, wish.threads)
            for a in kept
        }


def _speed(
    folder: Path,
    kept: list[ArtifactResult],
    source: Source,
    recipe: Recipe,
    wish: Wish,
    reporter: Reporter,
    scratch: Path,
) -> dict[str, ArtifactSpeed]:
    specs: dict[str, Export] = {artifact_name(spec): spec for spec in recipe.export}
    found = {}
    for artifact in kept:
        spec = specs[artifact.path]
        if isinstance(spec, CheckpointExport):
            continue  # no deployment runtime, as in a run
        twin = scratch / "dense" / artifact.path
        twin.parent.mkdir(exist_ok=True)
        with reporter.stage(f"dense twin of {artifact.path}"):
            checkpoint = Checkpoint.open(source.folder)
            request = ExportRequest(
                checkpoint,
                source.folder,
                source.gguf,
                twin,
                scratch / "base",
                spec,
                trust_remote_code=source.trust_remote_code,
            )
            (scratch / "base").mkdir(exist_ok=True)
            exporter(spec.format).export(request)
        report = time_side_by_side(
            recipe, spec, [twin, folder / artifact.path], wish.threads, reporter
        )
        found[artifact.path] = report.artifacts[1]
    return found
