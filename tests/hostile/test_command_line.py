"""Hostile inputs through the command line: exit code, one line, in time, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from svdexport import cli
from tests.hostile.makers import (
    CONFIG,
    gguf_bytes,
    llama_tensors,
    onnx_external,
    onnx_model,
    write_index,
    write_model,
    write_sharded,
)

RECIPE = """\
schema: 1
model: {path: m}
compress: {budget: {param_ratio: 0.8}}
export: [{format: checkpoint}]
"""


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def pickled(folder: Path) -> None:
    write_model(folder / "m")
    (folder / "m" / "model.safetensors").unlink()
    (folder / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))


def own_code(folder: Path) -> None:
    write_model(folder / "m", CONFIG | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    (folder / "m" / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def shard_outside(folder: Path) -> None:
    index = write_sharded(folder / "m")
    index["weight_map"]["model.norm.weight"] = "../x.safetensors"
    write_index(folder / "m", index)


def not_a_number(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"][2] = np.nan
    write_model(folder / "m", tensors=tensors)


def other_config(folder: Path) -> None:
    write_model(folder / "m", CONFIG | {"num_hidden_layers": 7})


def sound(folder: Path) -> None:
    write_model(folder / "m")


def call(folder: Path, *words: str) -> tuple[int, list[str]]:
    """Run the command line in this process; exit code and lines on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "svdexport", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "1 pickle": (pickled, "pytorch_model.bin"),
    "2 own code": (own_code, "trust_remote_code"),
    "3 shard outside": (shard_outside, "leaves the folder"),
    "8 not a number": (not_a_number, "model.norm.weight"),
    "9 other config": (other_config, "7 layers"),
}


@pytest.mark.parametrize("row", MODELS)
def test_a_hostile_model_is_exit_3_in_time_and_leaves_nothing(tmp_path: Path, row: str) -> None:
    make, words = MODELS[row]
    make(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    before = listing(tmp_path)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    code, lines = call(tmp_path, "run", "r.yaml")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent < 2
    assert (code, len(lines)) == (3, 1), lines
    assert words in lines[0]
    assert listing(tmp_path) == before


def refuse(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: str,
) -> tuple[int, list[str]]:
    """The same in this process, which is quicker: exit code and lines on stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["svdexport", *words])
    before = listing(folder)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert out == ""
    assert listing(folder) == before
    return int(caught.value.code or 0), err.splitlines()


@pytest.mark.parametrize(
    ("row", "words", "arguments"),
    [
        ("11", "not allowed", ["run", "tag.yaml"]),
        ("12", "aliases", ["run", "bomb.yaml"]),
        ("12", "not a recipe", ["run", "large.yaml"]),
        ("12", "latin.yaml", ["run", "latin.yaml"]),
        ("13", "did you mean 'budget'", ["run", "r.yaml", "--set", "compress.budgt.param_ratio=1"]),
        (
            "13",
            "not a finite number",
            ["plan", "r.yaml", "--set", "compress.budget.param_ratio=.nan"],
        ),
        ("13", "repeated key", ["run", "twice.yaml"]),
        (
            "13",
            "greater than or equal to 1",
            ["run", "r.yaml", "--set", "compress.rank_multiple=0"],
        ),
        ("14", "the input itself", ["run", "r.yaml", "--out", "m"]),
        ("14", "inside the input", ["run", "r.yaml", "--out", "m/out"]),
        ("14", "not an earlier output", ["run", "r.yaml", "--out", "thesis"]),
        ("14", "symbolic link", ["run", "r.yaml", "--out", "link"]),
        ("15", "text is empty", ["run", "r.yaml", "--set", "evaluate.text=empty.txt"]),
        ("15", "not UTF-8", ["run", "r.yaml", "--set", "evaluate.text=latin.txt"]),
        ("15", "no such file", ["run", "r.yaml", "--set", "evaluate.text=none.txt"]),
        ("15", "text is empty", ["eval", "m", "--text", "empty.txt"]),
    ],
)
def test_a_wrong_recipe_or_place_is_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: str,
    words: str,
    arguments: list[str],
) -> None:
    sound(tmp_path)
    files = {
        "r.yaml": RECIPE,
        "tag.yaml": "model: !!python/object/apply:os.mkdir [ran]",
        "bomb.yaml": "a: &a [x]\nb: [*a, *a]",
        "twice.yaml": RECIPE + "schema: 1\n",
        "large.yaml": "#" * 1_000_001,
        "empty.txt": " \n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.yaml").write_bytes(f"# Übermut\n{RECIPE}".encode("latin-1"))
    (tmp_path / "latin.txt").write_bytes("Übermut ".encode("latin-1") * 100)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "years.txt").write_text("of work")
    (tmp_path / "link").symlink_to("thesis")
    code, lines = refuse(tmp_path, monkeypatch, capsys, *arguments)
    assert (code, len(lines)) == (2, 1), (row, lines)
    assert words in lines[0]


def artifacts(folder: Path) -> None:
    """One broken artifact of each kind."""
    (folder / "m.gguf").write_bytes(gguf_bytes(n_tensors=-1))
    (folder / "other.gguf").write_bytes(b"not a model at all")
    (folder / "onnx").mkdir()
    outside = onnx_external({"location": "../w.data", "offset": "0", "length": "16"})
    (folder / "onnx" / "model.onnx").write_bytes(onnx_model(outside))
    (folder / "genai").mkdir()
    (folder / "genai" / "model.onnx").write_bytes(onnx_model(b""))
    config = {"model": {"decoder": {"session_options": {"custom_ops_library": "./evil.so"}}}}
    (folder / "genai" / "genai_config.json").write_text(json.dumps(config))
    shard_outside(folder)
    (folder / "t.txt").write_text("Some text. " * 100)


@pytest.mark.parametrize("command", ["inspect", "eval", "bench"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf", "-1 tensors"),
        ("other.gguf", "too short"),
        ("onnx", "leaves the folder"),
        ("genai", "native code"),
        ("m", "leaves the folder"),
        ("none", "no such file"),
    ],
)
def test_a_broken_artifact_is_exit_3(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    words: str,
) -> None:
    artifacts(tmp_path)
    text = ["--text", "t.txt"] if command == "eval" else []
    code, lines = refuse(tmp_path, monkeypatch, capsys, command, name, *text)
    assert (code, len(lines)) == (3, 1), lines
    assert words in lines[0]
