"""Rows 18 to 21: GGUF headers."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from svdexport.errors import InputError
from svdexport.safety import check_gguf
from tests.hostile.makers import (
    gguf_bytes,
    gguf_string,
    gguf_strings,
    gguf_tensor,
    gguf_text,
    gguf_u32,
)

ARCHITECTURE = gguf_text("general.architecture", "llama")


def refuse(tmp_path: Path, content: bytes, *words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        check_gguf(path)
    assert time.process_time() - begin < 2
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_sound_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes())
    header = check_gguf(tmp_path / "m.gguf")
    assert header.keys == {"general.architecture", "tokens"}
    assert {name: tensor.ne for name, tensor in header.tensors.items()} == {
        "a.weight": (8, 2),
        "b.weight": (16,),
    }
    assert header.tensors["b.weight"].offset == header.tensors["a.weight"].offset + 64


def test_what_gguf_py_writes_is_accepted(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_bool("flag", True)
    writer.add_custom_alignment(64)
    arrays = {"a.weight": np.ones((3, 32), np.float32), "b.weight": np.ones(5, np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    q8 = gguf.quantize(arrays["a.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = check_gguf(tmp_path / "m.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.ne == tuple(tensor.shape)
        assert ours.type == tensor.tensor_type.name


@pytest.mark.parametrize("magic", [b"GGML", b"FUGG", b"\0\0\0\0"])
def test_row_18_bad_magic(tmp_path: Path, magic: bytes) -> None:
    refuse(tmp_path, gguf_bytes(magic=magic), "not a GGUF file")


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_row_18_an_unknown_version(tmp_path: Path, version: int) -> None:
    refuse(tmp_path, gguf_bytes(version=version), f"version {version}")


def test_row_18_a_byte_swapped_file(tmp_path: Path) -> None:
    refuse(tmp_path, gguf_bytes(version=0x03000000), "big-endian")


@pytest.mark.parametrize("count", [-1, -(2**63), 2**62, 10_000])
def test_row_19_impossible_counts(tmp_path: Path, count: int) -> None:
    refuse(tmp_path, gguf_bytes(n_tensors=count), f"{count} tensors")
    refuse(tmp_path, gguf_bytes(n_keys=count), f"{count} keys")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**6])
def test_row_19_a_huge_string(tmp_path: Path, length: int) -> None:
    key = struct.pack("<Q", length) + b"name"
    refuse(tmp_path, gguf_bytes([key]), f"string of {length} bytes")
    value = gguf_string("k") + struct.pack("<IQ", 8, length)
    refuse(tmp_path, gguf_bytes([value]), f"string of {length} bytes")
    element = gguf_string("k") + struct.pack("<IIQQ", 9, 8, 1, length)
    refuse(tmp_path, gguf_bytes([element]), f"string of {length} bytes")


@pytest.mark.parametrize("count", [2**61, 2**64 - 1, 5000])
def test_row_19_an_array_longer_than_the_file(tmp_path: Path, count: int) -> None:
    refuse(tmp_path, gguf_bytes([gguf_strings("tokens", ["a"], count)]), f"{count} strings")
    numbers = gguf_string("k") + struct.pack("<IIQ", 9, 12, count)
    refuse(tmp_path, gguf_bytes([numbers]), f"{count} values")


def test_row_19_arrays_of_arrays_and_unknown_types(tmp_path: Path) -> None:
    nested = gguf_string("k") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)
    refuse(tmp_path, gguf_bytes([nested]), "arrays of arrays")
    refuse(tmp_path, gguf_bytes([gguf_string("k") + struct.pack("<II", 13, 0)]), "value type 13")
    refuse(tmp_path, gguf_bytes([gguf_string("k") + struct.pack("<IB", 7, 2)]), "truth value")


def test_row_19_millions_of_empty_strings_end_in_time(tmp_path: Path) -> None:
    count = 2_900_000
    head = gguf_string("k") + struct.pack("<IIQ", 9, 8, count)
    content = gguf_bytes([head + bytes(8 * count)], [gguf_tensor("a", (2**40,))], data=0)
    refuse(tmp_path, content, "ends at byte")
    head = gguf_string("k") + struct.pack("<IIQ", 9, 8, 3_100_000)
    refuse(tmp_path, gguf_bytes([head + bytes(8 * 3_100_000)]), "3100000 strings")


@pytest.mark.parametrize("n_dims", [0, 5, 10**6, 2**32 - 1])
def test_row_20_impossible_numbers_of_dimensions(tmp_path: Path, n_dims: int) -> None:
    tensor = gguf_tensor("a.weight", (8, 2), n_dims=n_dims)
    refuse(tmp_path, gguf_bytes(tensors=[tensor]), "a.weight", f"{n_dims} dimensions")


@pytest.mark.parametrize(
    "dims", [(4194305, 4194305, 211106198978564), (2**63,), (2**32, 2**32), (0, 4), (8, 0)]
)
def test_row_20_dimensions_whose_product_wraps(tmp_path: Path, dims: tuple[int, ...]) -> None:
    refuse(tmp_path, gguf_bytes(tensors=[gguf_tensor("a.weight", dims)]), "impossible dimensions")


def test_row_20_the_wrapping_product_is_small_in_64_bits() -> None:
    product = 4194305 * 4194305 * 211106198978564
    assert product >= 2**63
    assert product % 2**64 < 2**32


def test_row_21_repeated_names(tmp_path: Path) -> None:
    refuse(tmp_path, gguf_bytes([ARCHITECTURE, ARCHITECTURE]), "general.architecture", "repeated")
    tensors = [gguf_tensor("a.weight", (16,)), gguf_tensor("a.weight", (16,), offset=64)]
    refuse(tmp_path, gguf_bytes(tensors=tensors), "a.weight", "repeated")


@pytest.mark.parametrize("alignment", [0, 13, 4, 2**20])
def test_row_21_alignment(tmp_path: Path, alignment: int) -> None:
    key = gguf_u32("general.alignment", alignment)
    refuse(tmp_path, gguf_bytes([key]), f"alignment {alignment}")


def test_row_21_alignment_of_another_type(tmp_path: Path) -> None:
    refuse(tmp_path, gguf_bytes([gguf_text("general.alignment", "32")]), "general.alignment")


@pytest.mark.parametrize("offset", [1, 32, 63, 96, 128, 2**63, 2**64 - 32])
def test_row_21_a_bad_offset(tmp_path: Path, offset: int) -> None:
    tensors = [gguf_tensor("a.weight", (16,)), gguf_tensor("b.weight", (16,), offset=offset)]
    refuse(tmp_path, gguf_bytes(tensors=tensors, data=256), "b.weight", f"offset {offset}")


def test_row_21_data_past_the_end(tmp_path: Path) -> None:
    refuse(tmp_path, gguf_bytes(data=127), "b.weight", "ends at byte")
    refuse(tmp_path, gguf_bytes()[:40])


@pytest.mark.parametrize("kind", [4, 5, 31, 36, 43, 2**32 - 1])
def test_row_21_unknown_tensor_types(tmp_path: Path, kind: int) -> None:
    refuse(tmp_path, gguf_bytes(tensors=[gguf_tensor("a", (32,), kind)]), f"type {kind}")


def test_row_21_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    refuse(tmp_path, gguf_bytes(tensors=[gguf_tensor("a", (33,), 8)]), "multiple of Q8_0's 32")


@pytest.mark.parametrize("name", [b"", b"\xff\xfe", b"a\0b", b"x" * 64])
def test_row_21_impossible_names(tmp_path: Path, name: bytes) -> None:
    tensor = gguf_string(name) + struct.pack("<IQIQ", 1, 16, 0, 0)
    refuse(tmp_path, gguf_bytes(tensors=[tensor]))


def test_every_cut_of_a_sound_file_is_refused(tmp_path: Path) -> None:
    content = gguf_bytes()
    for end in range(len(content)):
        refuse(tmp_path, content[:end])
