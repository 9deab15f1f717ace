"""The compressed checkpoint folder: what ``compress`` writes and every exporter reads.

An ordinary Hugging Face folder. ``config.json`` carries ``quantization_config`` with
``quant_method: svdexport`` and, per compressed linear, its rank and the name of the linear that
holds the (possibly shared) first factor. Tensors: ``<leader>.lr_a.weight`` (k, n),
``<member>.lr_b.weight`` (m, k), ``<member>.bias``. In the remapped layout
``<leader>.lr_slots.weight`` holds A and all B. A dense folder opens the same way.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdexport.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from svdexport.core.lowrank import FactorPair

QUANT_METHOD = "svdexport"
FORMAT_VERSION = 1
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SLOTS = ".lr_slots.weight"  # a group's pair in Dobi-SVD's remapped layout (core/remap.py)


@dataclass(frozen=True)
class PairSpec:
    """Rank of a compressed linear and the linear (leader) under whose name A is stored."""

    rank: int
    group: str


@dataclass(frozen=True)
class EmbeddingSpec:
    """A low-rank token embedding: module path, rank, and the head that uses the same factors.

    Tensors: ``<name>.lr_a.weight`` (rank, tokens), ``<name>.lr_b.weight`` (width, rank).
    """

    name: str
    rank: int
    tied_head: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened by its headers; tensors are read one at a time.

    Attributes:
        path: the folder.
        config: its config.json.
        low_rank: compressed linears by module name; empty for a dense folder.
        files: tensor name -> safetensors file that holds it. A folder's tensors have the names of
            the model's parameters, with or without the base model's prefix in the file.
        remapped: of a remapped checkpoint, (m, n) of each compressed linear; its factors are made
            from the slots when they are asked for.
        stored: tensor name -> its name in the file, where that is another.
    """

    path: Path
    config: dict[str, Any]
    low_rank: dict[str, PairSpec]
    files: dict[str, Path]
    remapped: dict[str, tuple[int, int]] = field(default_factory=dict, kw_only=True)
    stored: dict[str, str] = field(default_factory=dict, kw_only=True)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a folder. Raises InputError where config.json or the weights are missing or odd."""
        path = Path(path)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no config.json: not a Hugging Face model folder") from None
        except (ValueError, OSError) as error:
            raise InputError(f"{path}/config.json: cannot be read ({error})") from None
        pairs, files = _low_rank_of(path, config), _tensor_files(path)
        renamed = {} if pairs else parameter_names(config, files)
        files = {renamed.get(name, name): file for name, file in files.items()}
        return cls(
            path,
            config,
            pairs,
            files,
            remapped=_remapped_shapes(path, config, pairs),
            stored={name: stored for stored, name in renamed.items()},
        )

    def names(self) -> list[str]:
        """Tensors of the model: of a remapped checkpoint factors, not slots."""
        stored = {name for name in self.files if not name.endswith(SLOTS)}
        return sorted(stored | self._factors().keys())

    def has(self, name: str) -> bool:
        return name in self.files or name in self._factors()

    def _factors(self) -> dict[str, str]:
        """Factor tensors that are made from slots -> the leader that holds them."""
        if not self.remapped:
            return {}
        made = {f"{name}.lr_b.weight": spec.group for name, spec in self.low_rank.items()}
        return made | {f"{leader}.lr_a.weight": leader for leader in made.values()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        from safetensors import safe_open

        leader = self._factors().get(name)
        if leader is not None:
            return self._restored(leader)[name]
        if name not in self.files:
            raise InputError(f"{self.path}: tensor {name} is missing")
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.stored.get(name, name))
        return tensor

    def _restored(self, leader: str) -> dict[str, Tensor]:
        """The factors of a group of a remapped checkpoint, by tensor name."""
        members = self.groups[leader]
        sizes = {member: self.remapped[member] for member in members}
        try:
            return restored_group(self.tensor(f"{leader}{SLOTS}"), leader, sizes)
        except ValueError as error:
            raise InputError(f"{self.path}: {leader}: {error}") from None

    def pair(self, linear: str) -> FactorPair:
        """The pair of a compressed linear, A taken from its group's leader."""
        from svdexport.core.lowrank import FactorPair

        spec = self.low_rank[linear]
        return FactorPair(
            self.tensor(f"{spec.group}.lr_a.weight"), self.tensor(f"{linear}.lr_b.weight")
        )

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Leader -> members (the leader among them), in the order of the config."""
        groups: dict[str, list[str]] = {}
        for name, spec in self.low_rank.items():
            groups.setdefault(spec.group, []).append(name)
        return groups

    @property
    def embedding(self) -> EmbeddingSpec | None:
        """The low-rank token embedding, where there is one."""
        section = self.config.get("quantization_config")
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            return None
        found = section.get("embedding")
        return None if found is None else EmbeddingSpec(**found)

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names():
            yield name, self.tensor(name)


_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def module_name(tensor: str) -> str:
    """A folder's tensor under the name of its module; only Mixtral's experts have another.

    ``block_sparse_moe.experts.0.w1.weight`` is ``mlp.experts.0.gate_proj.weight``.
    """
    name = tensor.replace(".block_sparse_moe.", ".mlp.")
    if name != tensor:
        name = re.sub(r"(\.experts\.\d+)\.(w[123])\.", lambda m: f"{m[1]}.{_ROLES[m[2]]}.", name)
    return name


def parameter_names(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, str]:
    """Tensor -> the parameter that transformers loads it into, for those named otherwise.

    Some folders, as the Hub's GPT-2 and Qwen3-Embedding, leave out the base model's prefix
    (``h.0.attn.c_attn.weight`` for ``transformer.h.0.attn.c_attn.weight``), and an encoder's may
    have one that the encoder alone does not know. Of GPT-NeoX ``embed_out`` is ``lm_head`` now.
    Empty where transformers has no such model.
    """
    import torch
    import transformers

    try:
        made = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        prefix = f"{getattr(made, 'base_model_prefix', '')}."
        prefixed = any(name.startswith(prefix) for name in tensors)
        if made is None or prefix == "." or prefixed != is_encoder(config):
            return _renamed(made, tensors)
        with torch.device("meta"):
            model = made(made.config_class.from_dict(dict(config)))
    except Exception:  # whatever a model's code raises; loading it says what is wrong
        return {}
    modules = {name for name, _ in model.named_modules()}
    found: dict[str, str] = {}
    for name in tensors:
        for known in (name, name.removeprefix(prefix) if prefixed else prefix + name):
            # of an expert its mixture, which may be a stack without modules of their own
            if re.sub(r"\.experts\..*|\.[^.]*$", "", module_name(known), count=1) in modules:
                found.setdefault(name, known)
    return {name: known for name, known in found.items() if name != known}


def _renamed(architecture: Any, tensors: Collection[str]) -> dict[str, str]:
    """Tensor -> its new name, where transformers renames some of this one class as it loads."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: dict[str, str] = {}
    for change in get_checkpoint_conversion_mapping(getattr(architecture, "__name__", "")) or []:
        if type(change) is WeightRenaming:
            found |= {name: change.rename_source_key(name)[0] for name in tensors}
    return {name: known for name, known in found.items() if name != known}


def experts_apart(low_rank: Iterable[str]) -> bool:
    """Whether some of the compressed linears are experts: then no expert is stored stacked."""
    return any(re.search(r"\.experts\.\d+\.", name) for name in low_rank)


def restored_group(
    slots: Tensor, leader: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Factor tensors by name, float32, of a group's slots; ``shapes`` (m, n) by member.

    Raises ValueError where the slots are of another shape.
    """
    import torch

    from svdexport.core.remap import restore

    rows = [m for m, _ in shapes.values()]
    a, b = restore(slots, sum(rows), next(iter(shapes.values()))[1])
    parts = zip(shapes, torch.split(b, rows), strict=True)
    return {f"{leader}.lr_a.weight": a} | {f"{n}.lr_b.weight": p.contiguous() for n, p in parts}


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model without a language-model head, such as BertModel."""
    name = str((config.get("architectures") or [""])[0])
    return name.endswith("Model") and not name.endswith("LMHeadModel")


def low_rank_config(
    low_rank: dict[str, PairSpec], embedding: EmbeddingSpec | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` that describes the given pairs."""
    more = {} if embedding is None else {"embedding": dataclasses.asdict(embedding)}
    return more | {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "low_rank": {
            name: {"rank": spec.rank, "group": spec.group} for name, spec in low_rank.items()
        },
    }


def _low_rank_of(path: Path, config: dict[str, Any]) -> dict[str, PairSpec]:
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return {}
    if section.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path}/config.json: low-rank format version {section.get('version')!r}; "
            f"this svdexport reads version {FORMAT_VERSION}"
        )
    try:
        return {
            str(name): PairSpec(int(entry["rank"]), str(entry["group"]))
            for name, entry in section["low_rank"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}/config.json: quantization_config.low_rank is malformed") from None


def _remapped_shapes(
    path: Path, config: dict[str, Any], pairs: Mapping[str, PairSpec]
) -> dict[str, tuple[int, int]]:
    found = (config.get("quantization_config") or {}).get("remapped") if pairs else None
    if found is None:
        return {}
    try:
        shapes = {str(name): (int(m), int(n)) for name, (m, n) in found.items()}
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{path}/config.json: quantization_config.remapped is malformed") from None
    if shapes.keys() != pairs.keys() or any(min(shape) < 1 for shape in shapes.values()):
        raise InputError(f"{path}/config.json: quantization_config.remapped does not fit low_rank")
    return shapes


def _tensor_files(path: Path) -> dict[str, Path]:
    index = path / INDEX_NAME
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): path / str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a safetensors index") from None
    single = path / SINGLE_NAME
    if not single.exists():
        raise InputError(f"{path}: no {SINGLE_NAME} and no {INDEX_NAME}; only safetensors are read")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except SafetensorError as error:
        raise InputError(f"{single}: not a readable safetensors file ({error})") from None
