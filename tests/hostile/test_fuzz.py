"""Random bytes and small damage: each check accepts or refuses in words, and ends."""

from __future__ import annotations

import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx.external_data_helper import _get_all_tensors
from safetensors import safe_open

from svdexport.errors import InputError, RecipeError
from svdexport.recipe import load_recipe
from svdexport.safety import check_gguf, check_model_folder, check_onnx, check_safetensors
from svdexport.safety.documents import parse_json
from tests.hostile.makers import (
    CONFIG,
    gguf_bytes,
    llama_tensors,
    onnx_external,
    onnx_model,
    safetensors_bytes,
    safetensors_parts,
)
from tests.unit.test_recipe import TEXT

ONNX = onnx_model(onnx_external({"location": "w.data", "offset": "0", "length": "16"}))
SAFETENSORS = safetensors_bytes(*safetensors_parts(llama_tensors()))
SEEDS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "m.gguf": (check_gguf, gguf_bytes()),
    "m.safetensors": (check_safetensors, SAFETENSORS),
    "m.onnx": (check_onnx, ONNX),
    "r.yaml": (load_recipe, TEXT.encode()),
    "config.json": (lambda path: check_model_folder(path.parent), json.dumps(CONFIG).encode()),
}
FILES = {
    "gguf": "m.gguf",
    "safetensors": "m.safetensors",
    "onnx": "m.onnx",
    "recipe": "r.yaml",
    "folder": "config.json",
}
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 12),
        st.binary(max_size=12)
        | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 0, 1, 32]).map(
            lambda value: struct.pack("<Q", value)
        ),
    ),
    min_size=1,
    max_size=4,
)


def libraries_agree(path: Path) -> None:
    """What a check accepts, the library behind it reads, and finds the same in it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(check_safetensors(path).tensors)
    elif path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        found = {t.name: (t.data_offset, t.n_bytes) for t in reader.tensors}
        ours = check_gguf(path).tensors
        assert found == {name: (t.offset, t.nbytes) for name, t in ours.items()}
    elif path.suffix == ".onnx":
        try:
            model = onnx.load(path, load_external_data=False)
        except DecodeError:
            return
        for tensor in _get_all_tensors(model):
            for entry in tensor.external_data:
                assert entry.key != "location" or entry.value == "w.data"


def survive(name: str, content: bytes) -> None:
    """Any outcome but acceptance or a one-line refusal fails."""
    check, _ = SEEDS[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "w.data").write_bytes(bytes(16))
        (Path(folder) / "model.safetensors").write_bytes(SAFETENSORS)
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            check(path)
        except (InputError, RecipeError) as error:
            lines = str(error).splitlines()
            assert lines
            assert all(line.isprintable() for line in lines)
            assert len(lines) == 1 or name == "r.yaml"
        else:
            libraries_agree(path)


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_sound(name: str, tmp_path: Path) -> None:
    check, content = SEEDS[name]
    (tmp_path / "w.data").write_bytes(bytes(16))
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name)


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=120, deadline=2000)
@given(edits=EDITS)
def test_damaged_files(name: str, edits: list[tuple[float, int, bytes]]) -> None:
    content = SEEDS[name][1]
    # Headers are where checks look: damage falls into the first 600 bytes.
    for place, drop, insert in edits:
        at = int(place * min(len(content), 600))
        content = content[:at] + insert + content[at + drop :]
    survive(name, content)


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=60, deadline=2000)
@given(content=st.binary(max_size=300))
@example(content=b"")
def test_random_bytes(name: str, content: bytes) -> None:
    survive(name, content)
    survive(name, SEEDS[name][1][:8] + content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F4", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**64), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=150, deadline=2000)
@given(st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRY | JSON, max_size=4))
def test_any_json_as_a_safetensors_header(header: dict[str, Any]) -> None:
    survive("m.safetensors", safetensors_bytes(header, bytes(64)))


@settings(max_examples=150, deadline=2000)
@given(st.dictionaries(st.text(max_size=5), JSON))
def test_our_reading_of_json_is_jsons_own(data: dict[str, Any]) -> None:
    text = json.dumps(data)
    assert json.dumps(parse_json(text.encode(), "x", constants=True)) == text


CORPORA = sorted((Path(__file__).parent / "corpus").glob("*.zip"))


@pytest.mark.parametrize("archive", CORPORA, ids=lambda path: path.stem)
def test_what_coverage_guided_fuzzing_found(archive: Path) -> None:
    """Inputs that reached new code in ``tools/fuzz/run.py``, once more."""
    name = FILES[archive.stem]
    with zipfile.ZipFile(archive) as inputs:
        assert inputs.namelist()
        for entry in inputs.namelist():
            survive(name, inputs.read(entry))
