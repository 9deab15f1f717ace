"""Writing the artifacts and their dense twins, and checking that the files hold what was meant."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from svdexport.checkpoint import Checkpoint, module_name
from svdexport.core.measures import Parity
from svdexport.export import Exported, ExportRequest, exporter
from svdexport.export.safetensors_write import SafetensorsWriter
from svdexport.files import sha256_file, write_atomic
from svdexport.models.experts import Experts
from svdexport.models.loader import load_model
from svdexport.models.weights import StreamedWeights
from svdexport.pipeline.inputs import versions
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.recipe import CheckpointExport, Export, GgufExport, OnnxExport
from svdexport.runtimes import Runtime, open_runtime
from svdexport.runtimes.artifact import kind
from svdexport.runtimes.encoder_rt import is_encoder_graph
from svdexport.runtimes.gguf_file import LORA_FORM, adapter_of, adapter_path
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.verify import evidence
from svdexport.verify.parity import (
    Rounding,
    compare,
    drowned,
    rounded_activations,
    rounding,
    tolerance,
)

PARITY_TOKENS = 128

Role = Literal["compressed", "dense", "plain"]
_EXPORTED = TypeAdapter(Exported)
_PARITY = TypeAdapter(Parity | None)


@dataclass(frozen=True)
class Artifact:
    """A written artifact: the recipe's entry, its role, and what the exporter and checks said."""

    spec: Export
    role: Role
    exported: Exported
    files: dict[str, str]
    round_trip: tuple[str, ...]
    parity: Parity | None

    @property
    def path(self) -> Path:
        return self.exported.path

    @property
    def problems(self) -> tuple[str, ...]:
        """What round trip or parity found wrong."""
        return self.round_trip or tuple(self.parity.problems if self.parity else ())


def artifact_name(spec: Export) -> str:
    """Name in the output folder, from the format and type alone."""
    if isinstance(spec, GgufExport):
        return f"model-{spec.label}.gguf"
    if isinstance(spec, CheckpointExport):
        remapped = "-remapped" if spec.layout == "remapped" else ""
        return f"checkpoint{'' if spec.dtype == 'source' else f'-{spec.dtype}'}{remapped}"
    return f"onnx-{spec.label}"


def export_all(
    job: Job,
    model: ModelUnderWork,
    checkpoint: Path,
    origin: str,
    quantized: Mapping[Export, Path],
) -> list[Artifact]:
    """Write every export of the recipe, compressed and dense, and check each file.

    ``quantized``: folders of weights that the run quantised itself; dense twins take none of them.
    """
    written: list[Artifact] = []
    for spec in job.recipe.export:
        name = artifact_name(spec)
        for role, root in (("compressed", job.rundir.staging), ("dense", job.work / "dense")):
            if role == "dense" and isinstance(spec, CheckpointExport):
                continue  # its twin is the user's own folder
            opened = Checkpoint.open(checkpoint if role == "compressed" else model.source.folder)
            packed = quantized.get(spec) if role == "compressed" else None
            stage_key = key(origin, spec, role)
            exported = _export(job, model, spec, opened, root / name, stage_key, packed)
            written.append(_checked(job, model, spec, role, opened, exported))  # type: ignore[arg-type]
    return written


def _export(
    job: Job,
    model: ModelUnderWork,
    spec: Export,
    opened: Checkpoint,
    out: Path,
    stage_key: str,
    packed: Path | None,
) -> Exported:
    record = job.work / "exports" / f"{out.parent.name}-{out.name}.json"
    scratch = job.work / "base"

    def make() -> None:
        for folder in (out.parent, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        source = model.source
        request = ExportRequest(
            opened, source.folder, source.gguf, out, scratch, spec, packed, source.trust_remote_code
        )
        made = exporter(spec.format).export(request)
        write_atomic(record, _EXPORTED.dump_json(made))
        for note in made.notes:
            job.reporter.note(note)

    lora = isinstance(spec, GgufExport) and spec.form == LORA_FORM
    files = [out, *([adapter_path(out)] if lora and opened.low_rank else []), record]
    job.stage(_export_stage(out), stage_key, files, make)
    return _EXPORTED.validate_json(record.read_bytes())


def _export_stage(out: Path) -> str:
    return f"export {out.parent.name} {out.name}".replace("out ", "", 1)


def _checked(
    job: Job,
    model: ModelUnderWork,
    spec: Export,
    role: Role,
    opened: Checkpoint,
    exported: Exported,
) -> Artifact:
    """Round trip and parity. A good result is kept, for the same bytes in the same runtimes; after
    a bad one the next run writes and checks the file again."""
    files = file_hashes(exported.path)
    name = f"{exported.path.parent.name}-{exported.path.name}"
    record = job.work / "checks" / f"{name}.json"
    problems = tuple(exporter(spec.format).check_round_trip(exported.path, exported.tensors))

    def make() -> None:
        found = None if problems else _parity(job, model, spec, opened, exported)
        write_atomic(record, _PARITY.dump_json(found))

    written = [record] if problems else [record, evidence_file(job, exported.path)]
    stage = f"check {role} {exported.path.name}"
    job.stage(stage, key(files, versions()), written, make)
    parity = _PARITY.validate_json(record.read_bytes())
    artifact = Artifact(spec, role, exported, files, problems, parity)
    if artifact.problems:
        job.rundir.forget(stage)
        job.rundir.forget(_export_stage(exported.path))
    return artifact


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of each file of an artifact, by path relative to its parent."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if path.suffix == ".gguf" and (adapter := adapter_of(path)) is not None:
        files.append(adapter)
    return {p.relative_to(path.parent).as_posix(): sha256_file(p) for p in files}


def _parity(
    job: Job, model: ModelUnderWork, spec: Export, opened: Checkpoint, exported: Exported
) -> Parity:
    """Logits of the file in its runtime against torch with the values read back from the file."""
    torch.set_num_threads(job.threads)
    stock = isinstance(spec, GgufExport) and spec.form != "pairs"  # read back as dense weights
    folder = model.source.folder if stock else opened.path
    values = exporter(spec.format).read_back(
        exported.path, opened, model.source.folder, model.source.gguf, job.work / "base"
    )
    limits = tolerance(exported.format, exported.type)
    with _reference(job, model, folder, values) as reference:
        tokens = parity_tokens(job, reference)
        torch_runtime = TorchRuntime(opened.path, job.threads, reference)
        expected = torch_runtime.logits(tokens)
        rounded = None
        rounds = _rounding(spec, exported)
        if rounds is not None:  # how much that may change
            with rounded_activations(reference, rounds):
                rounded = torch_runtime.logits(tokens)
    evidence.write(evidence.of(tokens, expected, rounded), evidence_file(job, exported.path))
    exact = may_be_exact(exported.path) and drowned(expected, rounded)
    if exact:
        job.reporter.note("8-bit activations drown this model's logits: checked with float32 ones")
    trusted = model.source.trust_remote_code
    runtime = parity_runtime(exported.path, job.threads, exact, trusted)
    try:
        return compare(expected, runtime.logits(tokens), limits, rounded, exact)
    finally:
        runtime.close()


def _rounding(spec: Export, exported: Exported) -> Rounding | None:
    size = spec.block_size if isinstance(spec, OnnxExport) else 32
    return rounding(exported.format, exported.type, size)


@contextlib.contextmanager
def _reference(
    job: Job, model: ModelUnderWork, folder: Path, values: Iterable[tuple[str, np.ndarray]]
) -> Iterator[nn.Module]:
    """The torch model of a folder with the values that were read back, loaded or streamed."""
    trusted = model.source.trust_remote_code
    if not model.memory.streamed:
        loaded = load_model(folder, trusted)
        load_values(loaded, values)
        yield loaded
        return
    scratch = job.work / "read-back.safetensors"
    with SafetensorsWriter(scratch) as writer:
        for name, value in values:
            writer.add(name, torch.from_numpy(np.array(value, dtype=np.float32)))
    with StreamedWeights(folder, (), trusted, scratch).on_call() as streamed:
        yield streamed
    scratch.unlink()


def evidence_file(job: Job, path: Path) -> Path:
    """What a parity check leaves for later repeats; a compressed artifact's is published."""
    return job.work / "checks" / f"{path.parent.name}-{path.name}.safetensors"


def parity_tokens(job: Job, model: Any) -> np.ndarray:
    """The first evaluation tokens: real text, so that the logits are those of ordinary use."""
    from safetensors.numpy import load_file

    tokens: np.ndarray = load_file(job.work / "tokens.safetensors")["evaluation"]
    return tokens.reshape(-1)[:PARITY_TOKENS]


def may_be_exact(path: Path) -> bool:
    """Whether the file's runtime can multiply in float32 what it multiplies in 8 bits: ONNX."""
    return path.is_dir() and kind(path) == "onnx" and not is_encoder_graph(path)


def parity_runtime(
    path: Path, threads: int, exact: bool = False, trust_remote_code: bool = False
) -> Runtime:
    """The artifact's runtime, with the cache in float32 where that can be chosen.

    Args:
        exact: activations are not rounded to 8 bits; see ``may_be_exact``.
        trust_remote_code: whether a checkpoint's own code may run.
    """
    if exact:
        from svdexport.runtimes.ort_exact import ExactOrtRuntime

        return ExactOrtRuntime(path, threads=threads, context=PARITY_TOKENS)
    if path.suffix == ".gguf":
        from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime

        return LlamaCppRuntime(path, threads=threads, context=PARITY_TOKENS, exact=True)
    return open_runtime(
        path, threads=threads, context=PARITY_TOKENS, trust_remote_code=trust_remote_code
    )


def load_values(model: nn.Module, values: Iterable[tuple[str, np.ndarray]]) -> None:
    """Put read-back values into a model, in place of its own. Raises ValueError on a wrong shape.

    A file may hold a tied head and embedding as two different tensors; both are then used.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding.weight
    given: set[int] = set()
    for name, value in values:
        path, _, attribute = module_name(name).rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Experts):  # a format that keeps them stacked
            module.put(attribute, torch.from_numpy(np.array(value, dtype=np.float32)))
            continue
        old = getattr(module, attribute)
        if tuple(old.shape) != value.shape:
            raise ValueError(f"{name}: read back as {value.shape}, expected {tuple(old.shape)}")
        new = nn.Parameter(torch.from_numpy(np.array(value, dtype=np.float32)), requires_grad=False)
        setattr(module, attribute, new)
        given.add(id(module))
    if tied and id(head) not in given:
        head.weight = embedding.weight
