"""Rows 1 to 10 of the list of hostile inputs: model folders and safetensors."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svdexport.errors import InputError
from svdexport.safety import (
    check_file_finite,
    check_finite,
    check_model_folder,
    check_safetensors,
)
from tests.hostile.makers import (
    CONFIG,
    llama_tensors,
    safetensors_bytes,
    safetensors_parts,
    write_index,
    write_model,
    write_safetensors,
    write_sharded,
)


def refuse(call: Callable[[], Any], *words: str) -> str:
    """The one line with which ``call`` refuses, in bounded time."""
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        call()
    assert time.process_time() - begin < 2
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_row_1_a_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the payload works where it is opened
    marker.unlink()
    refuse(lambda: check_model_folder(folder), name, "never opened")
    refuse(lambda: check_model_folder(folder / name), name, "never opened")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_row_2_custom_code_needs_the_recipes_consent(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path / "m")
    config = (CONFIG if file == "config.json" else {}) | {"auto_map": {"AutoModel": "evil.Model"}}
    (folder / file).write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refuse(lambda: check_model_folder(folder), file, "trust_remote_code")
    assert check_model_folder(folder, trust_remote_code=True).path == folder.resolve()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shard",
    ["../m.safetensors", "/etc/passwd", "a/../../m.safetensors", "C:\\m", "\\\\h\\m", "", "."],
)
def test_row_3_a_shard_outside_the_folder(tmp_path: Path, shard: str) -> None:
    write_safetensors(tmp_path / "m.safetensors", llama_tensors())
    index = write_sharded(tmp_path / "m")
    index["weight_map"]["model.norm.weight"] = shard
    write_index(tmp_path / "m", index)
    refuse(lambda: check_model_folder(tmp_path / "m"), "index.json", "leaves the folder")


def test_row_3_a_shard_that_is_a_link_to_outside(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "secret.safetensors", llama_tensors())
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refuse(lambda: check_model_folder(folder), "model.safetensors", "link that leaves")


def test_row_3_a_config_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    os.mkfifo(folder / "generation_config.json")
    refuse(lambda: check_model_folder(folder), "generation_config.json")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101 * 2**20, 5000])
def test_row_4_a_header_length_past_all_bounds(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    header, data = safetensors_parts(llama_tensors())
    raw = safetensors_bytes(header, data)
    path.write_bytes(struct.pack("<Q", length) + raw[8:] if length != 5000 else raw[:2000])
    tracemalloc.start()
    refuse(lambda: check_safetensors(path), "model.safetensors", "header")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_row_4_a_header_of_a_hundred_megabytes_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 101 * 10**6) + b"{")
        file.truncate(102 * 10**6)
    refuse(lambda: check_safetensors(path), "header of 101000000 bytes")


def spoil_offsets(header: dict[str, Any], data: bytes, how: str) -> tuple[dict[str, Any], bytes]:
    second = list(header)[1]
    begin, end = header[second]["data_offsets"]
    if how == "overlap":
        header[second]["data_offsets"] = [begin - 4, end - 4]
    elif how == "gap":
        for entry in list(header.values())[1:]:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
        data += bytes(4)
    elif how == "trailing":
        data += b"extra"
    elif how == "short":
        data = data[:-1]
    elif how == "same":
        header[second] = dict(header[next(iter(header))])
    return header, data


@pytest.mark.parametrize("how", ["overlap", "gap", "trailing", "short", "same"])
def test_row_5_data_that_does_not_cover_the_file_once(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.safetensors"
    header, data = spoil_offsets(*safetensors_parts(llama_tensors()), how)
    path.write_bytes(safetensors_bytes(header, data))
    words = {"overlap": "overlaps", "gap": "gap", "trailing": "5 bytes after", "short": "cut short"}
    refuse(lambda: check_safetensors(path), "model.safetensors", words.get(how, "overlaps"))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**32, 2**32]},
        {"shape": [2**62, 2**62, 16]},
        {"shape": [12, 9]},
        {"shape": [-12, -8]},
        {"shape": [12.0, 8]},
        {"shape": [True, 96]},
        {"shape": "12"},
        {"shape": [1] * 17},
        {"dtype": "F16"},
        {"dtype": "Q7"},
        {"dtype": ["F32"]},
        {"data_offsets": [384, 0]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 2**64]},
        {"extra": 1},
    ],
)
def test_row_6_a_shape_that_is_not_the_size(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    header, data = safetensors_parts(llama_tensors())
    header["model.embed_tokens.weight"].update(change)
    path.write_bytes(safetensors_bytes(header, data))
    refuse(lambda: check_safetensors(path), "model.safetensors", "model.embed_tokens.weight")


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', "{}x", "[" * 99999, '{"a": 1e999}'])
def test_row_6_a_header_that_is_no_sound_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(text, b""))
    refuse(lambda: check_safetensors(path), "model.safetensors")


def test_row_7_a_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    refuse(lambda: check_model_folder(tmp_path / "m"), "model-00002-of-00002", "missing")


def test_row_7_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    index = write_sharded(tmp_path / "m")
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    write_index(tmp_path / "m", index)
    refuse(lambda: check_model_folder(tmp_path / "m"), "model.ghost.weight", "does not hold")


def test_row_7_a_shard_with_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    index = write_sharded(tmp_path / "m")
    del index["weight_map"]["model.norm.weight"]
    write_index(tmp_path / "m", index)
    refuse(lambda: check_model_folder(tmp_path / "m"), "model.norm.weight")


def test_row_7_repeated_keys(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text('{"vocab_size": 12, "vocab_size": 13}')
    refuse(lambda: check_model_folder(folder), "config.json", "'vocab_size' is repeated")
    index = json.dumps(write_sharded(tmp_path / "n"))
    name = '"model.norm.weight": "model-00002-of-00002.safetensors"'
    assert name in index
    write_index(tmp_path / "n", index.replace(name, f"{name}, {name}"))
    refuse(lambda: check_model_folder(tmp_path / "n"), "index.json", "'model.norm.weight' is rep")
    header, data = safetensors_parts({"a": np.zeros(1, np.float32)})
    entry = json.dumps(header)[1:-1]
    path = tmp_path / "twice.safetensors"
    path.write_bytes(safetensors_bytes(f"{{{entry}, {entry}}}", data))
    refuse(lambda: check_safetensors(path), "twice.safetensors", "'a' is repeated")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_row_7_an_index_of_another_form(tmp_path: Path, index: str) -> None:
    write_sharded(tmp_path / "m")
    write_index(tmp_path / "m", index)
    refuse(lambda: check_model_folder(tmp_path / "m"), "index.json")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_row_8_one_number_that_is_not_finite(tmp_path: Path, value: float, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in llama_tensors().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    folder = write_model(tmp_path / "m", tensors=tensors)
    (header,) = check_model_folder(folder).headers
    refuse(lambda: check_file_finite(header), "model.safetensors", name, "[3, 5]")
    refuse(lambda: check_finite("f", name, tensors[name]), name, "[3, 5]")


def test_row_8_torch_tensors_and_clean_weights() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    check_finite("f", "w", tensor)
    tensor[2, 1] = float("inf")
    refuse(lambda: check_finite("f", "w", tensor), "'w'", "[2, 1]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "3 layers"),
        ({"num_hidden_layers": 1}, "1 layers"),
        ({"num_hidden_layers": "two"}, "number of layers"),
        ({"vocab_size": 13}, "vocab_size is 13"),
        ({"hidden_size": 16}, "hidden_size is 16"),
        ({"intermediate_size": 8}, "intermediate_size is 8"),
        ({"num_key_value_heads": 2}, "2 heads of 4"),
        ({"head_dim": 16}, "2 heads of 16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
    ],
)
def test_row_9_a_config_of_another_model(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = write_model(tmp_path / "m", CONFIG | change)
    refuse(lambda: check_model_folder(folder), "config.json", words)


def test_row_9_a_layer_in_the_middle_is_missing(tmp_path: Path) -> None:
    tensors = {
        name.replace("layers.1.", "layers.2."): array for name, array in llama_tensors().items()
    }
    folder = write_model(tmp_path / "m", tensors=tensors)
    refuse(lambda: check_model_folder(folder), "config.json", "number 2")


def test_row_9_integer_weights(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((16, 8), np.int8)
    folder = write_model(tmp_path / "m", tensors=tensors)
    refuse(lambda: check_model_folder(folder), "up_proj.weight", "not floating point")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"rank": 3, "group": "model.layers.0.mlp.up_proj"}, "rank 3"),
        ({"rank": 0, "group": "model.layers.0.mlp.up_proj"}, "needs a rank"),
        ({"rank": 2, "group": "model.layers.1.mlp.up_proj"}, "is missing"),
    ],
)
def test_row_9_pairs_of_another_rank(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = llama_tensors()
    del tensors[f"{name}.weight"]
    tensors[f"{name}.lr_a.weight"] = np.zeros((2, 8), np.float32)
    tensors[f"{name}.lr_b.weight"] = np.zeros((16, 2), np.float32)
    section = {"quant_method": "svdexport", "version": 1}
    good = section | {"low_rank": {name: {"rank": 2, "group": name}}}
    folder = write_model(tmp_path / "m", CONFIG | {"quantization_config": good}, tensors)
    assert check_model_folder(folder).tensors[f"{name}.lr_a.weight"].shape == (2, 8)
    bad = section | {"low_rank": {name: entry}}
    write_model(folder, CONFIG | {"quantization_config": bad}, tensors)
    refuse(lambda: check_model_folder(folder), "config.json", words)


def test_row_10_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    model = check_model_folder(write_model(tmp_path / "m"))
    assert model.tied_embeddings
    assert len(model.tensors) == len(llama_tensors())
    untied = check_model_folder(
        write_model(tmp_path / "n", CONFIG | {"tie_word_embeddings": False})
    )
    assert not untied.tied_embeddings


def test_row_10_a_hub_cache_of_links_into_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    write_model(snapshot)
    for path in sorted(snapshot.iterdir()):
        path.rename(blobs / f"hash-{path.name}")
        path.symlink_to(f"../../blobs/hash-{path.name}")
    model = check_model_folder(snapshot)
    assert set(model.tensors) == set(llama_tensors())
    (snapshot / "tokenizer.json").symlink_to("../../refs")
    (repository / "refs").write_text("x")
    refuse(lambda: check_model_folder(snapshot), "tokenizer.json", "link that leaves")


def test_what_safetensors_itself_writes_is_accepted(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"empty": np.zeros((0, 4), np.float16), "one": np.float64([1.5])}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = check_safetensors(tmp_path / "a.safetensors")
    check_file_finite(header)
    raw = (tmp_path / "a.safetensors").read_bytes()
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(header.tensors) == set(loaded)
    for name, info in header.tensors.items():
        assert raw[info.offset : info.offset + info.nbytes] == loaded[name].tobytes()
        assert info.shape == loaded[name].shape


def test_names_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    name = "evil\nError: all is well\x1b[2J" + "x" * 500
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    message = refuse(lambda: check_safetensors(tmp_path / "a.safetensors"), "evil")
    assert message.isprintable()
    assert len(message) < 400
