"""Hugging Face checkpoint folders: the work checkpoint, and the ``checkpoint`` export format."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdexport.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    SLOTS,
    Checkpoint,
    EmbeddingSpec,
    PairSpec,
    experts_apart,
    low_rank_config,
    module_name,
)
from svdexport.core.gauge import balance
from svdexport.core.remap import remap
from svdexport.export.base import Exported, ExportRequest, TensorRecord
from svdexport.export.safetensors_write import SafetensorsWriter
from svdexport.files import write_atomic
from svdexport.recipe import CheckpointExport
from svdexport.safety.headers import check_safetensors

SHARD_BYTES = 2 * 10**9
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

Named = tuple[str, Tensor]


def write_checkpoint(
    out: Path,
    source: Path,
    config: dict[str, Any],
    tensors: Iterable[Named],
) -> dict[str, TensorRecord]:
    """Write a folder: weights in shards of at most 2 GB, the given config, the source's tokenizer
    and, where the model needs it, its code.

    Args:
        out: folder to create. source: folder whose tokenizer files are copied as they are.
        tensors: streamed, one of them is held.

    Returns: what was meant to be written, by tensor name.
    """
    out.mkdir(parents=True)
    records: dict[str, TensorRecord] = {}
    shards: list[list[str]] = []
    writer: SafetensorsWriter | None = None
    with contextlib.ExitStack() as stack:
        for name, tensor in tensors:
            records[name] = _record(tensor)
            if writer is None or writer.nbytes + records[name].nbytes > SHARD_BYTES:
                stack.close()
                path = out / f"shard-{len(shards)}"
                writer = stack.enter_context(SafetensorsWriter(path))
                shards.append([])
            writer.add(name, tensor)
            shards[-1].append(name)
    _name_shards(out, shards, records)
    write_atomic(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    code = (path.name for path in source.glob("*.py")) if _asks_for_code(config, source) else ()
    for name in (*COPIED, *code):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return records


def _asks_for_code(config: dict[str, Any], source: Path) -> bool:
    """Whether model or tokenizer need the folder's own code; one that is not trusted with it was
    refused before."""
    tokenizer = source / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    return "auto_map" in config or "auto_map" in settings


def _name_shards(out: Path, shards: list[list[str]], records: dict[str, TensorRecord]) -> None:
    if len(shards) == 1:
        (out / "shard-0").rename(out / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{number}").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(record.nbytes for record in records.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(out / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _record(tensor: Tensor) -> TensorRecord:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRecord.of(tuple(tensor.shape), dtype, data.data)


def compressed_config(
    config: dict[str, Any],
    low_rank: dict[str, PairSpec],
    embedding: EmbeddingSpec | None = None,
) -> dict[str, Any]:
    """The source's config with the pairs described; unchanged where there are none."""
    changed = {key: value for key, value in config.items() if key != "quantization_config"}
    if low_rank or embedding is not None:
        changed["quantization_config"] = low_rank_config(low_rank, embedding)
    if embedding is not None and embedding.tied_head is not None:
        changed["tie_word_embeddings"] = False  # the factors are shared, not a table of weights
    return changed


def assembled(
    source: Checkpoint,
    low_rank: dict[str, PairSpec],
    made: Iterable[dict[str, Tensor]],
    replaced: Iterable[str] = (),
) -> Iterator[Named]:
    """Tensors of a compressed checkpoint: the source's, pairs in the place of their linears.

    ``made`` has the pairs, and new weights for the dense linears that ``replaced`` names. Where
    experts are pairs, tensors have their modules' names.
    """
    replaced = {f"{name}.weight" for name in (*low_rank, *replaced)}
    apart = experts_apart(low_rank)
    for name, tensor in source.iter_tensors():
        written = module_name(name) if apart else name
        if written not in replaced:
            yield written, tensor
    for tensors in made:
        yield from sorted(tensors.items())


def export(request: ExportRequest) -> Exported:
    """The ``checkpoint`` format: the work checkpoint in the dtype that the recipe asks for."""
    spec = request.spec
    assert isinstance(spec, CheckpointExport)
    checkpoint = request.checkpoint
    name: str = spec.dtype
    if name == "source":
        name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "")
        name = name if name in DTYPES else "float32"
    dtype = DTYPES[name]
    config = checkpoint.config | {"dtype": name, "torch_dtype": name}
    cast: Iterable[Named] = (
        (key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for key, tensor in checkpoint.iter_tensors()
    )
    if spec.layout == "remapped" and checkpoint.low_rank:  # else no pair has slots
        shapes = _shapes(checkpoint)
        section = config["quantization_config"] | {
            "remapped": {n: list(s) for n, s in shapes.items()}
        }
        config["quantization_config"] = section
        cast = _remapped(checkpoint, cast)
    records = write_checkpoint(request.out, request.source, config, cast)
    total = sum(f.stat().st_size for f in request.out.glob("*.safetensors"))
    return Exported(request.out, "checkpoint", name, total, records)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(m, n) of every compressed linear."""
    pairs = ((name, checkpoint.pair(name)) for name in checkpoint.low_rank)
    return {name: (pair.out_features, pair.in_features) for name, pair in pairs}


def _remapped(checkpoint: Checkpoint, cast: Iterable[Named]) -> Iterator[Named]:
    """Slots in the place of each group's factors; balanced, so that 8 bits suit both sides."""
    factors = {f"{spec.group}.lr_a.weight" for spec in checkpoint.low_rank.values()}
    factors |= {f"{name}.lr_b.weight" for name in checkpoint.low_rank}
    yield from ((name, tensor) for name, tensor in cast if name not in factors)
    for leader, members in checkpoint.groups.items():
        pairs = [checkpoint.pair(member) for member in members]
        stacked = torch.cat([pair.b.float() for pair in pairs])
        yield f"{leader}{SLOTS}", remap(*balance(pairs[0].a.float(), stacked))


def read_back(
    path: Path, checkpoint: Checkpoint, source: Path, source_gguf: Path | None, work: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of the written folder as float32, under their own names."""
    for name, tensor in Checkpoint.open(path).iter_tensors():
        yield name, tensor.float().numpy()


def check_round_trip(path: Path, tensors: dict[str, TensorRecord]) -> list[str]:
    """Compare shapes, types and bytes of the written folder with what was meant."""
    for file in sorted(path.glob("*.safetensors")):
        check_safetensors(file)
    written = Checkpoint.open(path)
    problems = [f"{name}: not in the file" for name in tensors if name not in written.files]
    for name in sorted(written.files):
        tensor = written.tensor(name)
        if name not in tensors:
            problems.append(f"{name}: not meant to be there")
        elif _record(tensor) != tensors[name]:
            problems.append(f"{name}: differs from what was meant")
    return problems
