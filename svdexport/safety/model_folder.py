"""A Hugging Face model folder, checked before any library reads from it.

What is promised afterwards: weights are safetensors with sound headers, the index and the shards
agree, nothing asks to run code, no file is reached through a link that leaves the folder, and the
sizes that config.json states are those of the tensors.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdexport.errors import InputError
from svdexport.safety.documents import quoted, read_json
from svdexport.safety.headers import SafetensorsHeader, TensorInfo, check_safetensors
from svdexport.safety.paths import model_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# Files that transformers reads and in which a model may ask for its own code.
_CODE_ASKING = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SLOTS = ".lr_slots.weight"  # a group's factors in the remapped layout (svdexport.core.remap)
_SCALE_SLOTS = 4
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder.

    Attributes:
        path: the folder, resolved.
        config: its config.json.
        shards: tensor name -> safetensors file.
        tensors: tensor name -> dtype, shape and place in its file.
        headers: one per safetensors file.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    shards: dict[str, Path] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    headers: tuple[SafetensorsHeader, ...] = field(repr=False)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head shares the embedding's tensor (transformers' default: yes)."""
        return bool(_text_config(self.config).get("tie_word_embeddings", True))


def check_model_folder(path: Path, trust_remote_code: bool = False) -> ModelFolder:
    """Check a model folder without importing, executing or unpickling anything.

    Args:
        path: the folder; a hub cache's snapshot with its links into ``blobs/`` is one.
        trust_remote_code: whether the recipe allows the model's own Python code.

    Raises:
        InputError: one line that names the file and what is wrong in it.
    """
    folder = _folder(Path(path))
    config = read_json(model_file(folder, "config.json", str(folder)))
    if not trust_remote_code:
        _refuse_code(folder)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}/adapter_config.json: an adapter; merge it into its model first")
    headers = _headers(folder)
    shards: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in shards:
                other = shards[name].name
                raise InputError(f"{header.path}: tensor {quoted(name)} is in {other} as well")
            shards[name] = header.path
            tensors[name] = info
    if not tensors:
        raise InputError(f"{headers[0].path}: holds no tensors")
    checked = ModelFolder(folder, config, shards, tensors, headers)
    _check_dtypes(checked)
    _check_sizes(checked)
    _check_pairs(checked)
    return checked


def check_config(path: Path, trust_remote_code: bool = False) -> None:
    """Check a model folder as ``check_model_folder`` does, but for its weights, which may be
    missing: enough for whoever reads the configuration alone. Raises InputError."""
    folder = _folder(Path(path))
    read_json(model_file(folder, "config.json", str(folder)))
    if not trust_remote_code:
        _refuse_code(folder)


def _folder(path: Path) -> Path:
    """The resolved folder, all of whose entries are ordinary or lead to where they may."""
    if path.suffix in PICKLES and path.is_file():
        raise InputError(f"{path}: a pickle can run code and is never opened; give safetensors")
    if not path.is_dir():
        problem = "not a folder" if path.exists() else "no such folder"
        raise InputError(f"{path}: {problem}; give a Hugging Face model folder")
    try:
        folder = path.resolve(strict=True)
        entries = sorted(folder.iterdir())
        if not (folder / "config.json").exists():
            raise InputError(f"{path}: no config.json: not a Hugging Face model folder")
        for entry in entries:
            if entry.is_symlink() and not entry.is_dir():
                model_file(folder, entry.name, str(folder))
            elif not stat.S_ISREG(mode := entry.stat().st_mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{entry}: neither a file nor a folder")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return folder


def _refuse_code(folder: Path) -> None:
    for name in _CODE_ASKING:
        if (folder / name).exists():
            path = model_file(folder, name, str(folder))
            data = read_json(path)
            if "auto_map" in data or "custom_pipelines" in data:
                raise InputError(
                    f"{path}: asks to run the model's own code (auto_map); only where you trust "
                    f"it, set model.trust_remote_code: true (verify: --trust-remote-code)"
                )


def _headers(folder: Path) -> tuple[SafetensorsHeader, ...]:
    index = folder / INDEX
    has_single = (folder / SINGLE).exists() or (folder / SINGLE).is_symlink()
    if not index.exists() and not index.is_symlink():
        if has_single:
            return (check_safetensors(model_file(folder, SINGLE, str(folder))),)
        raise _no_weights(folder)
    weight_map = _weight_map(model_file(folder, INDEX, str(folder)))
    names = sorted(set(weight_map.values()))
    if has_single and names != [SINGLE]:
        raise InputError(f"{folder}: both {SINGLE} and an index of other files; remove one of them")
    # All names first: none is opened where one leaves the folder.
    paths = {name: model_file(folder, name, str(index)) for name in names}
    headers = {name: check_safetensors(path) for name, path in paths.items()}
    for tensor, name in weight_map.items():
        if tensor not in headers[name].tensors:
            raise InputError(f"{index}: names tensor {quoted(tensor)}, which {name} does not hold")
    for name, header in headers.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != name:
                raise InputError(f"{header.path}: holds {quoted(tensor)}, which {INDEX} lacks")
    return tuple(headers.values())


def _weight_map(index: Path) -> dict[str, str]:
    data = read_json(index)
    weight_map = data.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise InputError(f"{index}: weight_map must map tensors to files")
    return weight_map


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        return InputError(
            f"{folder / pickles[0]}: a pickle can run code and is never opened; convert the model "
            f"to safetensors"
        )
    return InputError(f"{folder}: no {SINGLE} and no {INDEX}; weights are read from safetensors")


def _check_dtypes(model: ModelFolder) -> None:
    """Weights must be plain floating-point numbers: a quantised model has lost what is needed."""
    quantization = model.config.get("quantization_config")
    remapped = False
    if isinstance(quantization, dict):
        remapped = quantization.get("remapped") is not None
        method = quantization.get("quant_method")
        if method != "svdexport":
            raise InputError(
                f"{model.path}/config.json: already quantised ({quoted(method)}); give the "
                f"original weights"
            )
    for name, info in model.tensors.items():
        slots = remapped and name.endswith(_SLOTS)
        allowed, kind = ({"I16"}, "I16") if slots else (_FLOATS, "floating point")
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype not in allowed:
            raise InputError(
                f"{model.shards[name]}: tensor {quoted(name)} is {info.dtype}, not {kind}; "
                f"give the original weights"
            )


def _check_pairs(model: ModelFolder) -> None:
    """Factor pairs of a compressed checkpoint: both there, of the rank that the config states."""
    section = model.config.get("quantization_config")
    if not isinstance(section, dict):
        return
    where = f"{model.path}/config.json"
    low_rank = section.get("low_rank")
    if not isinstance(low_rank, dict):
        raise InputError(f"{where}: quantization_config.low_rank is missing")
    pairs = {name: _rank_and_group(where, name, entry) for name, entry in low_rank.items()}
    slots = _slot_widths(where, section.get("remapped"), pairs)
    embedding = section.get("embedding")
    if embedding is not None:
        name = embedding.get("name") if isinstance(embedding, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{where}: quantization_config.embedding needs a name and a rank")
        pairs[name] = _rank_and_group(where, name, embedding | {"group": name})
    for name, (rank, group) in pairs.items():
        shapes: dict[str, tuple[int | None, int | None]] = {
            f"{group}.lr_a.weight": (rank, None),
            f"{name}.lr_b.weight": (None, rank),
        }
        if name in slots:
            shapes = {f"{group}{_SLOTS}": (rank, slots[name])}
        for tensor, shape in shapes.items():
            info = model.tensors.get(tensor)
            if info is None:
                raise InputError(f"{where}: tensor {quoted(tensor)} is missing")
            fits = (size in (None, found) for size, found in zip(shape, info.shape, strict=False))
            if len(info.shape) != 2 or not all(fits):
                raise InputError(
                    f"{where}: rank {rank}, but tensor {quoted(tensor)} has shape {info.shape}"
                )


def _rank_and_group(where: str, name: str, entry: Any) -> tuple[int, str]:
    rank = entry.get("rank") if isinstance(entry, dict) else None
    group = entry.get("group") if isinstance(entry, dict) else None
    if type(rank) is not int or rank < 1 or not isinstance(group, str):
        raise InputError(f"{where}: low_rank of {quoted(name)} needs a rank and a group")
    return rank, group


def _slot_widths(where: str, remapped: Any, pairs: dict[str, tuple[int, str]]) -> dict[str, int]:
    """Columns of the slots that hold each linear's pair; empty in the ordinary layout.

    ``remapped`` has (m, n) of each linear; a group's members are stacked along m.
    """
    if remapped is None:
        return {}
    if not (
        isinstance(remapped, dict)
        and remapped.keys() == pairs.keys()
        and all(isinstance(shape, list) and len(shape) == 2 for shape in remapped.values())
        and all(type(size) is int and size > 0 for shape in remapped.values() for size in shape)
    ):
        raise InputError(f"{where}: quantization_config.remapped does not fit low_rank")
    stacked: dict[str, tuple[int, int]] = {}
    for name, (_, group) in pairs.items():
        m, n = remapped[name]
        rows, inputs = stacked.get(group, (0, n))
        if n != inputs:
            raise InputError(f"{where}: quantization_config.remapped: inputs of a group differ")
        stacked[group] = (rows + m, n)
    return {name: max(stacked[group]) + _SCALE_SLOTS for name, (_, group) in pairs.items()}


def _check_sizes(model: ModelFolder) -> None:
    """Layer count, vocabulary and widths of config.json against the tensors."""
    config = _text_config(model.config)
    _check_layers(model, config)
    width = config.get("word_embed_proj_dim") or config.get("embedding_size")
    rules = {
        "embed_tokens.weight": ("vocab_size", width or "hidden_size"),
        "wte.weight": ("vocab_size", "n_embd"),
        "embed_in.weight": ("vocab_size", "hidden_size"),
        "word_embeddings.weight": ("vocab_size", width or "hidden_size"),
        "lm_head.weight": ("vocab_size", width or "hidden_size"),
        "self_attn.q_proj.weight": (None, "hidden_size"),
        "self_attn.k_proj.weight": (None, "hidden_size"),
        "self_attn.v_proj.weight": (None, "hidden_size"),
        "self_attn.o_proj.weight": ("hidden_size", None),
        "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
        "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
        "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
        "input_layernorm.weight": ("hidden_size",),
    }
    for name, info in model.tensors.items():
        parts = name.split(".")
        rule = rules.get(".".join(parts[-3:])) or rules.get(".".join(parts[-2:]))
        if rule is None or _is_other_tower(name):
            continue
        if len(info.shape) != len(rule):
            raise InputError(f"{model.shards[name]}: {quoted(name)} has shape {info.shape}")
        for size, key in zip(info.shape, rule, strict=True):
            stated = config.get(key) if isinstance(key, str) else key
            if isinstance(stated, int) and stated != size:
                label = key if isinstance(key, str) else "embedding width"
                raise InputError(
                    f"{model.path}/config.json: {label} is {stated}, but tensor {quoted(name)} "
                    f"has shape {info.shape}"
                )
    _check_heads(model, config)


def _check_layers(model: ModelFolder, config: dict[str, Any]) -> None:
    stated = next(
        (config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config),
        None,
    )
    found = {int(index) for index in _layer_indices(model.tensors)}
    if stated is None or not found or config.get("is_encoder_decoder"):
        return
    if type(stated) is not int or stated < 1:
        raise InputError(f"{model.path}/config.json: {quoted(stated)} is no number of layers")
    # Some models append layers that predict further tokens and count them apart.
    extra = config.get("num_nextn_predict_layers")
    most = stated + (extra if type(extra) is int and extra > 0 else 0)
    if not stated <= len(found) <= most or max(found) + 1 != len(found):
        raise InputError(
            f"{model.path}/config.json: states {stated} layers, but the tensors are of "
            f"{len(found)} layers, the last of them number {max(found)}"
        )


def _check_heads(model: ModelFolder, config: dict[str, Any]) -> None:
    """Rows of q, k and v where the config states heads in the way of the Llama family."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        return
    head_dim = config.get("head_dim") or width // heads
    # Other attention shapes (latent attention, per-layer head sizes) have keys of their own.
    if type(head_dim) is not int or any("lora_rank" in key or "global" in key for key in config):
        return
    kv_heads = config.get("num_key_value_heads") or heads
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        for name, info in model.tensors.items():
            ours = name.endswith(f".self_attn.{part}_proj.weight") and not _is_other_tower(name)
            # Some models put an output gate into q_proj and so have twice its rows.
            if ours and info.shape[0] not in (count * head_dim, 2 * count * head_dim):
                raise InputError(
                    f"{model.path}/config.json: {count} heads of {head_dim}, but tensor "
                    f"{quoted(name)} has shape {info.shape}"
                )


def _layer_indices(names: Iterator[str] | dict[str, TensorInfo]) -> Iterator[str]:
    for name in names:
        match = _LAYER.search(name)
        if match and not _is_other_tower(name):
            yield match[1]


def _is_other_tower(name: str) -> bool:
    """Vision and audio parts of a multimodal model and extra heads have sizes of their own."""
    return any(part in name for part in ("vision", "visual", "audio", "mtp.", "encoder."))


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
