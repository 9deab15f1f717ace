"""The exact size of a GGUF file that is not written yet, from names, shapes and ranks."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.core.lowrank import FactorPair
from svdexport.errors import InputError
from svdexport.export import gguf_base
from svdexport.export.gguf import assembled, pairs_of
from svdexport.export.gguf_layout import pair_places, stacked
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_stock import adapter
from svdexport.export.gguf_write import file_bytes
from svdexport.recipe import GgufExport
from svdexport.runtimes.gguf_file import LORA_FORM, GgufFile

HEADER_ONLY = Path(__file__).parent / "scripts" / "gguf_header.py"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these has the tokens
DTYPES = {"float16": "F16", "bfloat16": "BF16"}  # config.json's, as safetensors calls them

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Unwritten(Checkpoint):
    """A compressed checkpoint by its ranks: pairs have shapes and no values.

    Attributes:
        shapes: (out_features, in_features) of every compressed linear.
    """

    shapes: Mapping[str, tuple[int, int]]

    def pair(self, linear: str) -> FactorPair:
        import torch

        rank, (rows, columns) = self.low_rank[linear].rank, self.shapes[linear]
        a = torch.empty(rank, columns, device="meta")
        return FactorPair(a, torch.empty(rows, rank, device="meta"))


def header_of(folder: Path, parameters: Shapes, dtype: str, work: Path) -> GgufFile:
    """The file that llama.cpp's converter would make of a model, its data a hole.

    Args:
        folder: the model; where its weights are not there, a stand-in of their shapes is used.
        parameters: name -> shape. dtype: of the weights, as in config.json.
        work: scratch folder; nothing of size is written.

    Raises:
        InputError: there is no tokenizer, or the converter refuses the model.
        MissingExtraError: no converter is installed.
    """
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise InputError(f"{folder}: no tokenizer, which makes up most of a GGUF's metadata")
    if not any(folder.glob("*.safetensors")):
        folder = _stand_in(folder, parameters, DTYPES.get(dtype, "F32"), work)
    out = work / "header.gguf"
    gguf_base.convert(
        folder, out, gguf_base.exact_outtype(Checkpoint.open(folder)), through=HEADER_ONLY
    )
    return GgufFile(out)


def exact_bytes(
    spec: GgufExport,
    base: GgufFile,
    low_rank: dict[str, PairSpec],
    shapes: Mapping[str, tuple[int, int]],
) -> int:
    """Bytes of the exported file, and of the adapter beside it where the form has one.

    Args:
        base: the converter's file, or the user's GGUF.
        low_rank, shapes: the pairs, by linear; none for the dense twin.

    Raises InputError where a linear has no tensor of its own under llama.cpp's usual name.
    """
    if spec.base == "weight":  # pairs that are fitted one by one
        low_rank = {n: PairSpec(min(p.rank, *shapes[n]), p.group) for n, p in low_rank.items()}
    checkpoint = Unwritten(base.path, {}, low_rank, {}, shapes)
    places = pair_places(checkpoint, _by_name(base, low_rank))
    kept = pairs_of(spec, base, checkpoint, places)
    metadata, layout, types = assembled(spec, base, checkpoint, places, kept)
    size = file_bytes(metadata, layout.tensors, base.alignment)
    if places and spec.form == LORA_FORM:
        size += file_bytes(*adapter(checkpoint, stacked(places, base), base, types), base.alignment)
    return size


def _by_name(base: GgufFile, linears: Mapping[str, PairSpec]) -> dict[str, Match]:
    """Where each linear's weight stands, by the names that gguf-py knows for the architecture."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if base.architecture not in kinds:
        raise InputError(f"{base.path}: gguf-py does not know architecture {base.architecture}")
    blocks = int(base.value(f"{base.architecture}.block_count", 0))
    names = gguf.get_tensor_name_map(kinds[base.architecture], blocks)
    found = {}
    for linear in linears:
        name = f"{names.get_name(linear)}.weight"
        if name not in base.tensors or len(base.tensors[name].ne) != 2:
            raise InputError(f"{linear}: llama.cpp stacks or renames it in a way of its own")
        found[f"{linear}.weight"] = Match(name, None, None, False)
    return found


def _stand_in(folder: Path, parameters: Shapes, dtype: str, work: Path) -> Path:
    """A folder of the same name with the same small files, and weights that are a hole."""
    place = work / "stand-in" / folder.resolve().name  # the converter calls the model by it
    place.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".bin" and not path.name.endswith(".index.json"):
            (place / path.name).symlink_to(path.resolve())
    width = {"F32": 4}.get(dtype, 2)
    header, at = {}, 0
    for name, shape in parameters.items():
        end = at + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return place
