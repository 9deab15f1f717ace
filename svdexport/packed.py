"""Weights that were quantised before their export: what the ``quantize`` stage leaves.

A folder of safetensors files. For a checkpoint tensor ``name`` in a format ``kind`` (a ggml type,
or an ONNX grid such as ``nbits-4-32-symmetric``) the entries ``name#part`` hold its bytes, and each
file's metadata says the kinds. Exporters write these bytes as they are.

A linear that the checkpoint has dense may have a pair here besides, for what its quantised matrix
loses (residual form); the metadata then says under whose name its A stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from svdexport.errors import InputError

KINDS = "kinds"
LEADERS = "leaders"
GGUF_PART = "data"  # uint8 (rows, bytes of a row)


@dataclass(frozen=True)
class PackedWeight:
    """One quantised tensor: the format's name and its arrays by part."""

    kind: str
    parts: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PackedFolder:
    """An opened folder.

    Attributes:
        files: tensor -> file. kinds: tensor -> format. leaders: of a linear in residual form, the
            one whose A it uses.
    """

    files: dict[str, Path]
    kinds: dict[str, str]
    leaders: dict[str, str]

    @classmethod
    def open(cls, folder: Path | None) -> PackedFolder:
        """Read the headers. Without a folder nothing is packed."""
        from safetensors import SafetensorError, safe_open

        files: dict[str, Path] = {}
        kinds: dict[str, str] = {}
        leaders: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder else ():
            try:
                with safe_open(path, framework="numpy") as file:
                    found = json.loads(file.metadata()[KINDS])
                    leaders |= json.loads(file.metadata().get(LEADERS, "{}"))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: not a file of packed weights ({error})") from None
            kinds |= found
            files |= dict.fromkeys(found, path)
        return cls(files, kinds, leaders)

    def read(self, tensor: str) -> PackedWeight:
        """A tensor's bytes."""
        from safetensors import safe_open

        with safe_open(self.files[tensor], framework="numpy") as file:
            names = [name for name in file.keys() if name.rpartition("#")[0] == tensor]  # noqa: SIM118
            parts = {name.rpartition("#")[2]: file.get_tensor(name) for name in names}
        return PackedWeight(self.kinds[tensor], parts)


def write_packed(
    path: Path,
    weights: Mapping[str, PackedWeight],
    leaders: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write one file of the folder, whole or not at all. ``leaders``: see ``PackedFolder``."""
    from safetensors.numpy import save_file

    arrays = {
        f"{name}#{part}": np.ascontiguousarray(array)
        for name, weight in weights.items()
        for part, array in weight.parts.items()
    }
    kinds = {name: weight.kind for name, weight in weights.items()}
    making = path.with_suffix(".making")
    metadata = {KINDS: json.dumps(kinds)}
    if leaders:
        metadata[LEADERS] = json.dumps(dict(leaders), sort_keys=True)
    save_file(arrays, making, metadata=metadata)
    making.replace(path)
