"""Export to GGUF: llama.cpp's own conversion of the model, dense matrices replaced by pairs.

Pairs stand in the file as the low-rank contract says (``svdexport.low_rank.version`` 1). A
checkpoint without pairs gives the dense twin by the same code: its bytes are those that
llama.cpp's quantiser gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from svdexport.checkpoint import Checkpoint
from svdexport.export import gguf_stock
from svdexport.export.base import Exported, ExportRequest
from svdexport.export.gguf_fuse import ARCHITECTURES, fuse
from svdexport.export.gguf_importance import NO_IMPORTANCE, Importance, read_importance
from svdexport.export.gguf_layout import Layout, LayoutBuilder, PairPlace, Ready, stacked
from svdexport.export.gguf_norms import trained_gains
from svdexport.export.gguf_packed import ready_tensors
from svdexport.export.gguf_plan import changed_tensors, make_plan, unproven
from svdexport.export.gguf_read import check_round_trip, read_back
from svdexport.export.gguf_residual import beside_dense
from svdexport.export.gguf_types import Types, file_type
from svdexport.export.gguf_write import Planned, string, u32, u64, write
from svdexport.packed import PackedFolder
from svdexport.recipe import GgufExport
from svdexport.runtimes.gguf_file import FORM_KEY, LORA_FORM, GgufFile, adapter_path

__all__ = ["check_round_trip", "export", "read_back"]

PAIR_VERSION = 1
FILE_TYPE_KEY = "general.file_type"
OWN_PREFIX = "svdexport."


def export(request: ExportRequest) -> Exported:
    """Write one GGUF file.

    Raises:
        InputError: the converter refuses the model, a pair cannot be placed, or a tensor cannot be
            held in its type; the line names it.
    """
    spec = request.spec
    if not isinstance(spec, GgufExport):
        raise TypeError(f"a GGUF export needs a GgufExport, not {type(spec).__name__}")
    plan = make_plan(request.checkpoint, request.source, request.source_gguf, request.work)
    base = plan.base.file
    original = spec.base == "weight"  # whatever the compression has made of dense weights
    changed = {} if original else changed_tensors(request.checkpoint, request.source, plan)
    places, out = plan.places, request.out
    stacks = stacked(places, base)
    if spec.form == "stock":
        changed |= gguf_stock.dense_weights(request.checkpoint, stacks)
    elif spec.form == LORA_FORM and not original:
        changed |= gguf_stock.remainders(request.checkpoint, stacks, base)
    importance = read_importance(request.work if spec.importance else None, plan.matches)
    kept = pairs_of(spec, base, request.checkpoint, places)
    packed = PackedFolder.open(request.packed)
    changed |= trained_gains(packed, base, request.checkpoint)
    ready = ready_tensors(packed, plan.matches, kept)
    factors = beside_dense(packed, plan.matches, base)
    metadata, layout, types = assembled(
        spec, base, request.checkpoint, places, kept, changed, importance, ready, factors
    )
    layout.notes += unproven(plan)
    if spec.head_type and spec.embedding_type and "output.weight" not in base.tensors:
        layout.notes.append(
            f"head_type {spec.head_type} changes nothing: head and embedding are one tensor, and "
            f"embedding_type is {spec.embedding_type}"
        )
    records = write(out, metadata, layout.tensors, base.alignment)
    size = out.stat().st_size
    if places and spec.form == LORA_FORM:
        beside = adapter_path(out)
        fitted = packed if original else None
        parts = gguf_stock.adapter(request.checkpoint, stacks, base, types, fitted)
        records |= write(beside, *parts, base.alignment)
        size += beside.stat().st_size
        layout.notes.append(f"the pairs stand in the LoRA adapter {beside.name}; both files belong")
    return Exported(out, "gguf", spec.label, size, records, tuple(layout.notes))


def pairs_of(
    spec: GgufExport, base: GgufFile, checkpoint: Checkpoint, places: list[PairPlace]
) -> list[PairPlace]:
    """The places of the pairs that the file of this form has as pairs."""
    kept = places if spec.form == "pairs" else []
    if spec.fuse and base.architecture in ARCHITECTURES:
        return fuse(kept, checkpoint, base.tensors)
    return kept


def assembled(
    spec: GgufExport,
    base: GgufFile,
    checkpoint: Checkpoint,
    places: list[PairPlace],
    kept: list[PairPlace],
    changed: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
    importance: Importance = NO_IMPORTANCE,
    ready: Mapping[str, Ready] = MappingProxyType({}),
    beside: Mapping[str, list[Planned]] = MappingProxyType({}),
) -> tuple[list[bytes], Layout, Types]:
    """Metadata and tensors of the file, no value computed yet; and the types that were chosen.

    Args:
        places: of all pairs. kept: of those that the file has as pairs.
        changed, ready: tensors whose rows are not the base's, and those quantised before.
        beside: factors that stand beside a dense tensor.
    """
    types = Types.of(spec, tied="output.weight" not in base.tensors)
    builder = LayoutBuilder(base, checkpoint, types, kept, changed, importance, ready, beside)
    layout = builder.build()
    form = spec.form if places else "pairs"
    number = file_type(spec.type, ((t.type, t.nbytes) for t in layout.tensors))
    return merged_metadata(base, number, form, layout if kept or beside else None), layout, types


def merged_metadata(
    base: GgufFile, file_type_number: int, form: str, layout: Layout | None
) -> list[bytes]:
    """The base's entries byte for byte; ours put in their place or at the end.

    ``layout`` is given where the file holds pairs.
    """
    entries = {k: v for k, v in base.kv_bytes.items() if not k.startswith(OWN_PREFIX)}
    entries[FILE_TYPE_KEY] = u32(FILE_TYPE_KEY, file_type_number)
    if form != "pairs":
        entries[FORM_KEY] = string(FORM_KEY, form)
    if layout is not None:
        entries["version"] = u32(f"{OWN_PREFIX}low_rank.version", PAIR_VERSION)
        entries["dense"] = u64(f"{OWN_PREFIX}low_rank.params_dense", layout.params_dense)
        entries["params"] = u64(f"{OWN_PREFIX}low_rank.params", layout.params)
    return list(entries.values())
