"""Quantised bytes are llama.cpp's own, and gguf-py reads them back to the same values."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdexport.core.grids_gguf import GRIDS
from svdexport.errors import InputError
from svdexport.export.gguf_types import FILE_TYPES, FLOATS, file_type
from svdexport.runtimes.ggml import bindings, fits, quantize, row_bytes
from svdexport.runtimes.gguf_file import BLOCKS, TYPE_NUMBERS, GgufFile, to_float32
from tests.unit.gguf_models import export, make_model

ALL_TYPES = sorted(FILE_TYPES)
BY_GGUF_PY = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]  # the types that gguf-py itself quantises to


@pytest.mark.parametrize("type_name", BY_GGUF_PY)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_bytes_equal_gguf_pys(type_name: str, seed: int, rows: int, blocks: int) -> None:
    values = np.random.default_rng(seed).normal(0, 3, (rows, 32 * blocks)).astype(np.float32)
    expected = gguf_py.quants.quantize(values, gguf_py.GGMLQuantizationType[type_name])
    assert quantize(values, type_name).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type_name", ALL_TYPES)
def test_values_read_back_are_near(type_name: str) -> None:
    values = np.random.default_rng(0).normal(0, 1, (40, 512)).astype(np.float32)
    raw = quantize(values, type_name)
    assert raw.shape == (40, row_bytes(type_name, 512))
    error = to_float32(raw, type_name) - values
    bits = 8 * row_bytes(type_name, 512) / 512
    # a uniform grid of b bits over +-4 sigma has an rms step error of 8 / 2^b / sqrt(12); a float
    # has fewer bits for the number itself
    grid_bits = {"BF16": 10, "F16": 12, "F32": 20}.get(type_name, bits)
    assert np.sqrt((error**2).mean()) < 1.2 * 8 / 2**grid_bits / np.sqrt(12)


def test_importance_lowers_the_error_of_the_channels_that_matter() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (64, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 8 == 0, 100.0, 1.0).astype(np.float32)

    def weighted(raw: np.ndarray) -> float:
        return float(((to_float32(raw, "Q3_K") - values) ** 2 @ importance).sum())

    plain, aware = quantize(values, "Q3_K"), quantize(values, "Q3_K", importance)
    assert weighted(aware) < 0.9 * weighted(plain)


def test_chunks_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0, 1, (33, 256)).astype(np.float32)
    whole = quantize(values, "Q4_K")
    monkeypatch.setattr("svdexport.runtimes.ggml.CHUNK_ELEMENTS", 4 * 256)
    assert np.array_equal(quantize(values, "Q4_K"), whole)


@pytest.mark.parametrize(
    ("bad", "word"),
    [(np.nan, "NaN or Inf"), (np.inf, "NaN or Inf"), (-np.inf, "NaN or Inf"), (1e6, "past F16")],
)
def test_values_that_f16_cannot_hold_are_refused(bad: float, word: str) -> None:
    values = np.ones((2, 32), np.float32)
    values[1, 3] = bad
    with pytest.raises(InputError, match=word):
        quantize(values, "F16")


def test_rows_that_a_type_cannot_hold_are_refused() -> None:
    assert fits("Q8_0", 96) and not fits("Q4_K", 96)
    with pytest.raises(InputError, match="multiple of 256"):
        quantize(np.ones((2, 96), np.float32), "Q4_K")


def test_type_tables_agree_with_gguf_py() -> None:
    for kind, size in gguf_py.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never in a file; gguf-py has an old size of it
            assert BLOCKS[kind.name] == size
        assert TYPE_NUMBERS[kind.name] == int(kind)


def test_a_mixed_file_says_the_type_that_most_of_it_has() -> None:
    names = {int(number): name for name, number in gguf_py.LlamaFileType.__members__.items()}
    for kind in (*FLOATS, *GRIDS):  # whatever a budget in bytes may choose
        number = file_type("mixed", [("F32", 10), (kind, 30), ("Q4_0", 20), (kind, 30)])
        assert re.fullmatch(f"(MOSTLY|ALL)_{kind}(_S)?", names[number])


@pytest.mark.parametrize("tied", [True, False])
def test_dense_twin_is_what_llama_cpp_quantises(tied: bool, tmp_path: Path) -> None:
    """Every tensor's type and bytes, embedding and head included, for each type's ftype."""
    source = make_model(
        tmp_path / "source",
        "Llama",
        hidden_size=256,
        intermediate_size=256,
        tie_word_embeddings=tied,
    )
    base = export(source, source, tmp_path / "base.gguf", type="F32")
    for type_name in ("F16", "Q8_0", "Q4_0"):
        made = export(source, source, tmp_path / f"{type_name}.gguf", type=type_name)
        ours, theirs = GgufFile(made.path), GgufFile(_llama_quantize(base.path, type_name))
        assert ours.value("general.file_type") == theirs.value("general.file_type")
        for name, info in theirs.tensors.items():
            assert (name, ours.tensors[name].type) == (name, info.type)
            assert np.array_equal(ours.raw(name), theirs.raw(name)), name


def _llama_quantize(path: Path, type_name: str) -> Path:
    lib = bindings()
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[type_name]
    params.nthread = 1
    out = path.with_name(f"llama-{type_name}.gguf")
    assert (
        lib.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params)) == 0
    )
    return out
