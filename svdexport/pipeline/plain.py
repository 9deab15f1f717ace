"""Plainly quantised files of like size: the second baseline of every compressed file."""

from __future__ import annotations

import dataclasses

from pydantic import TypeAdapter

from svdexport.checkpoint import Checkpoint
from svdexport.export import Exported, ExportRequest, exporter
from svdexport.files import write_atomic
from svdexport.pipeline.artifacts import Artifact, artifact_name, file_hashes
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.recipe import GgufExport, OnnxExport

# The next lower precision of a dense graph.
LOWER = {"fp32": "int8", "fp16": "int8", "int8": "int4", "int4": "int2"}
_EXPORTED = TypeAdapter(Exported)


def export_plain(job: Job, model: ModelUnderWork, compressed: list[Artifact]) -> list[Artifact]:
    """A plain file for each compressed one that has a rival; the same file is not listed twice."""
    found: dict[str, Artifact] = {}
    if job.recipe.baselines.plain == "off":
        return []
    for artifact in compressed:
        made = _plain(job, model, artifact)
        if made is not None and str(made.path) not in found:
            found[str(made.path)] = Artifact(
                artifact.spec, "plain", made, file_hashes(made.path), (), None
            )
    return list(found.values())


def _plain(job: Job, model: ModelUnderWork, artifact: Artifact) -> Exported | None:
    spec = artifact.spec
    folder = job.work / "plain"
    record = job.work / "exports" / f"plain-{artifact.path.name}.json"
    if isinstance(spec, OnnxExport) and spec.precision not in LOWER:
        job.reporter.note(f"{artifact.path.name}: no lower precision to compare with")
        return None
    if not isinstance(spec, GgufExport | OnnxExport):
        return None

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        made = (
            _gguf(job, model, artifact) if isinstance(spec, GgufExport) else _onnx(job, model, spec)
        )
        write_atomic(record, _EXPORTED.dump_json(dataclasses.replace(made, tensors={})))

    stage = f"plain file beside {artifact.path.name}"
    job.stage(stage, key(artifact.files), [record, folder], make)
    return _EXPORTED.validate_json(record.read_bytes())


def _gguf(job: Job, model: ModelUnderWork, artifact: Artifact) -> Exported:
    from svdexport.export.gguf_plain import export_plain as export_gguf

    source = model.source
    return export_gguf(
        source.folder,
        source.gguf,
        job.work / "base",
        job.work / "plain",
        artifact.exported.bytes,
        job.threads,
    )


def _onnx(job: Job, model: ModelUnderWork, spec: OnnxExport) -> Exported:
    # without block_size: each precision has the block that is fastest
    lower = OnnxExport.model_validate(
        {"precision": LOWER[spec.precision], "operators": spec.operators}
    )
    source = model.source
    out = job.work / "plain" / artifact_name(lower)
    dense = Checkpoint.open(source.folder)
    request = ExportRequest(
        dense,
        source.folder,
        source.gguf,
        out,
        job.work / "base",
        lower,
        trust_remote_code=source.trust_remote_code,
    )
    return exporter("onnx").export(request)
