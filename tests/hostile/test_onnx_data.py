"""Rows 23 and 24: external data of ONNX models."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from svdexport.errors import InputError
from svdexport.safety import check_onnx
from tests.hostile.makers import ONNX_PLACES, onnx_external, onnx_model, proto

GOOD = {"location": "w.data", "offset": "0", "length": "16"}


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    if not (folder / "w.data").exists():
        (folder / "w.data").write_bytes(bytes(64))
    return folder


def refuse(path: Path, *words: str) -> None:
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        check_onnx(path)
    assert time.process_time() - begin < 2
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def with_entries(tmp_path: Path, entries: dict[str, str], dims: tuple[int, ...] = (4,)) -> Path:
    return write(tmp_path / "m", onnx_model(onnx_external(entries, dims)))


@pytest.mark.parametrize("place", ONNX_PLACES)
def test_external_data_is_found_wherever_a_tensor_can_be(tmp_path: Path, place: str) -> None:
    check_onnx(write(tmp_path / "m", onnx_model(onnx_external(GOOD), place)))
    bad = onnx_external(GOOD | {"location": "../w.data"})
    refuse(write(tmp_path / "m", onnx_model(bad, place)), "leaves the folder")


@pytest.mark.parametrize(
    "location",
    ["../w.data", "a/../../w.data", "/etc/passwd", "C:\\w", "..\\w.data", "", ".", "w\0.data"],
)
def test_row_23_a_location_outside(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.data").write_bytes(bytes(64))
    refuse(
        with_entries(tmp_path, GOOD | {"location": location}),
        *("model.onnx", "tensor 'w'", "the path", "is empty or leaves the folder"),
    )


def test_row_23_the_in_memory_marker_of_onnxruntime_is_no_file(tmp_path: Path) -> None:
    entries = GOOD | {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}
    refuse(with_entries(tmp_path, entries), "_ORT_MEM_ADDR_", "no such file")


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder", "pipe"])
def test_row_23_a_link(tmp_path: Path, link: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "w.data").write_bytes(bytes(64))
    folder = with_entries(tmp_path, GOOD)
    if link == "folder":
        (folder / "sub").symlink_to(secret)
        entries = GOOD | {"location": "sub/w.data"}
        refuse(with_entries(tmp_path, entries), "through a link")
        return
    (folder / "w.data").unlink()
    if link == "symbolic":
        (folder / "w.data").symlink_to(secret / "w.data")
    elif link == "hard":
        os.link(secret / "w.data", folder / "w.data")
    else:
        os.mkfifo(folder / "w.data")
    words = {"symbolic": "through a link", "hard": "hard link", "pipe": "not an ordinary file"}
    refuse(folder, "w.data", words[link])


def test_row_23_a_linked_model_with_external_data(tmp_path: Path) -> None:
    folder = with_entries(tmp_path, GOOD)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.onnx").symlink_to(folder / "model.onnx")
    (other / "w.data").write_bytes(bytes(64))
    refuse(other, "a link to a model")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("offset", "-16", "is not a number of bytes"),
        ("offset", "65", "external offset 65 is past the 64 bytes of w.data"),
        ("offset", "56", "external data to byte 72, but w.data has 64"),
        ("offset", str(2**64), "is not a number of bytes"),
        ("offset", "0x10", "is not a number of bytes"),
        ("offset", "١٦", "is not a number of bytes"),
        ("offset", "", "is not a number of bytes"),
        ("length", "-16", "is not a number of bytes"),
        ("length", "80", "external data to byte 80, but w.data has 64"),
        ("length", str(2**63), f"external data to byte {2**63}, but w.data has 64"),
        ("length", "15", "shape [4] takes 16 bytes, 15 are stated"),
        ("length", "20", "shape [4] takes 16 bytes, 20 are stated"),
    ],
)
def test_row_24_a_range_past_the_file(tmp_path: Path, key: str, value: str, words: str) -> None:
    refuse(with_entries(tmp_path, GOOD | {key: value}), "model.onnx", "'w'", words)


@pytest.mark.parametrize("dims", [(17,), (2**31, 2**31, 4), (2**64 - 4,), (3,), (2**62,) * 60])
def test_row_24_a_shape_that_is_not_the_length(tmp_path: Path, dims: tuple[int, ...]) -> None:
    refuse(with_entries(tmp_path, GOOD, dims), "'w'", "shape")
    without = {"location": "w.data"}
    if dims != (3,):
        refuse(with_entries(tmp_path, without, dims), "'w'", "shape")


def test_row_24_entries_that_are_missing_or_doubled(tmp_path: Path) -> None:
    refuse(with_entries(tmp_path, {}), "'w'")
    tensor = onnx_external(GOOD) + proto((13, proto((1, "location"), (2, "../x"))))
    refuse(write(tmp_path / "m", onnx_model(tensor)), "twice")
    text = onnx_external(GOOD).replace(proto((2, 1)), proto((2, 8)), 1)
    refuse(write(tmp_path / "m", onnx_model(text)), "data type 8")


def test_row_24_a_model_over_two_gigabytes(tmp_path: Path) -> None:
    folder = with_entries(tmp_path, GOOD)
    os.truncate(folder / "model.onnx", 2**31 + 8)
    refuse(folder, "model.onnx", "over 2 GB")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\xff" * 40,
        b"hello world",
        proto((1, 10)),
        b"\x3a\xff\xff\xff\xff\x7f",
        b"\0\0",
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    refuse(write(tmp_path / "m", content), "model.onnx")


def test_graphs_without_end(tmp_path: Path) -> None:
    graph = proto((2, "g"))
    for _ in range(200):
        graph = proto((1, proto((5, proto((6, graph))))))
    refuse(write(tmp_path / "m", proto((7, graph))), "too deeply")
    refuse(write(tmp_path / "m", proto((7, b"\x08\x01" * 1_600_000))), "protobuf fields")


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"decoder": {"filename": "../x.onnx"}}},
        {"model": {"decoder": {"filename": "/x.onnx"}}},
        {"model": {"decoder": {"session_options": {"custom_ops_library": "x"}}}},
        {"model": {"decoder": {"session_options": {"providers": [{"p": "evil.so"}]}}}},
        {"model": {"decoder": {"o": {"backend_path": "libQnn.so.2"}}}},
    ],
)
def test_a_genai_config_that_reaches_outside(tmp_path: Path, config: dict[str, object]) -> None:
    folder = with_entries(tmp_path, GOOD)
    (folder / "genai_config.json").write_text(json.dumps(config))
    refuse(folder, "genai_config.json")


def test_what_onnx_itself_writes_is_accepted(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    arrays = {"a": np.ones((40, 8), np.float32), "b": np.ones(300, np.int64)}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    out = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [40, 8])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [out], tensors))
    for external in (False, True):
        folder = tmp_path / str(external)
        folder.mkdir()
        onnx.save_model(model, folder / "m.onnx", save_as_external_data=external, location="d")
        assert (folder / "d").exists() == external
        check_onnx(folder)
        check_onnx(folder / "m.onnx")
    (tmp_path / "True" / "d").write_bytes(b"short")
    refuse(tmp_path / "True", "m.onnx")
