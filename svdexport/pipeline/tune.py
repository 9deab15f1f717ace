"""``quantize.tune``: the norms of one quantised export trained towards the dense model's logits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn

from svdexport.core.linears import is_transposed
from svdexport.errors import InputError
from svdexport.export import gguf_base
from svdexport.export.gguf_norms import TRAINED, norm_places
from svdexport.models.decoder import Decoder
from svdexport.models.loader import load_model
from svdexport.packed import GGUF_PART, PackedFolder, PackedWeight, write_packed
from svdexport.pipeline.artifacts import artifact_name, load_values
from svdexport.pipeline.job import Job, ModelUnderWork
from svdexport.pipeline.refine import training_text
from svdexport.pipeline.stages import Compressed
from svdexport.recipe import Export, GgufExport
from svdexport.refine import RefineData
from svdexport.refine.gains import gain, norms, tune
from svdexport.runtimes.gguf_file import to_float32

FILE = "norms.safetensors"


def tune_gains(
    job: Job, model: ModelUnderWork, compressed: Compressed, spec: Export, folder: Path
) -> None:
    """Leave trained gains beside the packed weights of an export.

    The model's weights are loaded whole; ``stages.check_streamed`` refuses others at the start.

    Raises InputError where none of its norms stands in the GGUF as it is in the model.
    """
    quantize = job.recipe.quantize
    assert quantize is not None and quantize.tune is not None and isinstance(spec, GgufExport)
    scratch = job.work / "tune" / artifact_name(spec)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trusted = model.source.trust_remote_code
    start = model.source.folder if spec.form == "stock" else compressed.checkpoint
    module: nn.Module = load_model(start, trusted).eval().requires_grad_(False)
    student = Decoder(module, model.structure)
    own = {f"{name}.weight": gain(part).float().numpy() for name, part in norms(student).items()}
    base = gguf_base.prepare(model.source.folder, model.source.gguf, job.work / "base").file
    placed = norm_places(base, own)
    if not placed:
        raise InputError(
            f"{model.source.given}: quantize.tune: no norm of this model stands in its GGUF as it "
            "is in the model; leave tune out"
        )
    load_values(module, _values(module, PackedFolder.open(folder)))
    dense = Decoder(model.model, model.structure)
    text = training_text(job, model, compressed.tokens, quantize.tune, scratch)
    data = RefineData(
        student,
        lambda: dense,
        lambda: iter(()),
        {},
        text,
        scratch,
        job.reporter.progress,
        "quantize.tune",
    )
    found = tune(data, quantize.tune, dense, {name.removesuffix(".weight") for name in placed})
    packed = {
        name: PackedWeight(TRAINED, {GGUF_PART: values.float().numpy()})
        for name, values in found.tensors.items()
    }
    write_packed(folder / FILE, packed)
    shutil.rmtree(scratch)
    for note in found.notes:
        job.reporter.note(f"{artifact_name(spec)}: {note}")


def _values(module: nn.Module, packed: PackedFolder) -> Iterator[tuple[str, np.ndarray]]:
    """The packed weights as the file will give them back, in the model's orientation; a pair beside
    a quantised matrix within it."""

    def read(name: str) -> np.ndarray:
        weight = packed.read(name)
        return to_float32(weight.parts[GGUF_PART], weight.kind)

    factors = {f"{leader}.lr_a.weight" for leader in packed.leaders.values()}
    factors |= {f"{linear}.lr_b.weight" for linear in packed.leaders}
    for name in packed.kinds:
        if name in factors:
            continue
        linear, values = name.rpartition(".")[0], read(name)
        if linear in packed.leaders:
            a, b = f"{packed.leaders[linear]}.lr_a.weight", f"{linear}.lr_b.weight"
            values = values + read(b) @ read(a)
        yield name, values.T if is_transposed(module.get_submodule(linear)) else values
