"""What a GGUF file holds and which runtime it needs, from its header alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdexport.runtimes.artifact import size_bytes
from svdexport.runtimes.gguf_file import GgufFile, adapter_of, element_count
from svdexport.safety.gguf_header import GgufTensor

STOCK = "llama.cpp"
WITH_PAIRS = "llama.cpp with low-rank pairs (the runtime that svdexport builds)"
ADAPTER = "llama.cpp, as a LoRA adapter beside its base model"
FIRST = re.compile(r"\.lr_a\.weight$|\.lora_a$")
SECOND = re.compile(r"\.lr_b\.weight$|\.lora_b$")
SHARED = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
    "ffn_gate": "ffn_gate_up",
    "ffn_up": "ffn_gate_up",
}


def inspect(path: Path) -> dict[str, Any]:
    """Describe a GGUF file, ours or anyone's, together with the adapter that a file says it has.

    Returns:
        ``format, path, architecture, name, runtime``; ``linears``: for each matrix of a block
        ``layer, name, form`` (dense, pair, shared pair, residual pair, lora pair, residual lora
        pair), ``rank, shape`` (outputs, inputs), ``types, bytes``, the bytes of a shared A counted
        at the first linear that uses it; ``other``: the same for matrices outside the blocks;
        ``totals``: ``bytes, parameters, tensors, dense, pairs, types``.

    Raises:
        InputError: the file's header is broken, or its adapter is missing.
    """
    file, beside = GgufFile(path), adapter_of(path)
    tensors = file.tensors | (GgufFile(beside).tensors if beside is not None else {})
    linears: list[dict[str, Any]] = []
    other: list[dict[str, Any]] = []
    counted: set[str] = set()
    for name, info in tensors.items():
        seconds = (name.replace(".weight", ".lr_b.weight"), f"{name}.lora_b")
        is_part = FIRST.search(name) or not tensors.keys().isdisjoint(seconds)
        if len(info.ne) > 1 and not is_part:
            entry = _linear(tensors, name, info, counted)
            (other if entry["layer"] is None else linears).append(entry)
    linears.sort(key=lambda entry: int(entry["layer"]))  # a file may count 1, 10, 11, 2
    kinds = Counter(entry["form"] for entry in linears + other)
    pairs = sum(kinds.values()) - kinds["dense"]
    return {
        "format": "gguf",
        "path": str(path),
        "architecture": file.architecture,
        "name": file.value("general.name"),
        "runtime": _runtime(file, beside, pairs > 0),
        "linears": linears,
        "other": other,
        "totals": {
            "bytes": size_bytes(path),
            "parameters": sum(element_count(info) for info in tensors.values()),
            "tensors": len(tensors),
            "dense": kinds["dense"],
            "pairs": pairs,
            "types": _by_type(tensors),
        },
    }


def _linear(
    tensors: Mapping[str, GgufTensor], name: str, info: GgufTensor, counted: set[str]
) -> dict[str, Any]:
    stem = SECOND.sub("", name).removesuffix(".weight")
    block = re.match(r"blk\.(\d+)\.(.+)", stem)
    entry: dict[str, Any] = {
        "layer": int(block[1]) if block else None,
        "name": block[2] if block else stem,
        "form": "dense",
        "rank": None,
        "shape": list(info.ne[::-1]),
        "types": {"weight": info.type},
        "bytes": info.nbytes,
    }
    a = _first_factor(tensors, name, stem)
    if a is None:
        return entry
    first, dense = tensors[a], tensors.get(f"{stem}.weight")
    form = "pair" if a.startswith(f"{stem}.") else "shared pair"
    form = "lora pair" if a.endswith("lora_a") else form
    entry["form"] = form
    entry["rank"] = first.ne[1]
    entry["shape"] = [*info.ne[:1:-1], info.ne[1], first.ne[0]]
    entry["types"] = {"a": first.type, "b": info.type}
    entry["bytes"] += 0 if a in counted else first.nbytes
    counted.add(a)
    if dense is not None:
        entry["form"] = f"residual {form}"
        entry["types"]["weight"] = dense.type
        entry["bytes"] += dense.nbytes
    return entry


def _first_factor(tensors: Mapping[str, GgufTensor], name: str, stem: str) -> str | None:
    """Name of A for a B: its own, or that of its group; None where this is no B."""
    if not SECOND.search(name):
        return None
    prefix, _, last = stem.rpartition(".")
    group = f"{prefix}.{SHARED.get(last, last)}"
    names = (f"{stem}.lr_a.weight", f"{group}.lr_a.weight", f"{stem}.weight.lora_a")
    return next((a for a in names if a in tensors), None)


def _runtime(file: GgufFile, beside: Path | None, pairs: bool) -> str:
    if file.value("general.type") == "adapter":
        return ADAPTER
    if beside is not None:
        return f"{STOCK} with --lora {beside.name}"
    return WITH_PAIRS if pairs else STOCK


def _by_type(tensors: Mapping[str, GgufTensor]) -> dict[str, dict[str, int]]:
    """Type -> tensors and bytes, the largest first."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for info in tensors.values():
        count[info.type] += 1
        size[info.type] += info.nbytes
    return {name: {"tensors": count[name], "bytes": total} for name, total in size.most_common()}
