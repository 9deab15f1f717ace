"""A decoder in onnxruntime: long texts, folders of other layouts, graphs of one position."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError
from svdexport.export.onnx import DATA_FILE, LAST_FILE, MODEL_FILE
from svdexport.runtimes import ort_rt
from svdexport.runtimes.ort_rt import OrtRuntime, model_file
from tests.unit.test_export_onnx import TOKENS, relative, run_export, torch_logits
from tests.unit.tiny_checkpoints import make_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray]:
    """A folder in float32, with a cache that GroupQueryAttention writes into or one that grows, and
    torch's logits of TOKENS."""
    root = tmp_path_factory.mktemp("onnx")
    model = make_model(root / "source", request.param)
    run_export(root / "source", Checkpoint.open(root / "source"), root / "onnx", "fp32")
    return root / "onnx", torch_logits(model, TOKENS)


@pytest.fixture
def folder(made: tuple[Path, np.ndarray], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


@pytest.mark.parametrize("chunk", [16, 39, 1])
def test_a_long_text_is_read_in_chunks_over_its_cache(
    made: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Of 40 tokens the last chunk is shorter, or a single one."""
    monkeypatch.setattr(ort_rt, "_CHUNK", chunk)
    runtime = OrtRuntime(made[0], threads=1)
    steps: list[int] = []
    whole = runtime._step

    def counted(tokens: np.ndarray) -> np.ndarray:
        steps.append(tokens.size)
        return whole(tokens)

    monkeypatch.setattr(runtime, "_step", counted)
    assert relative(runtime.logits(TOKENS), made[1]) < 1e-4
    assert steps == {16: [16, 16, 8], 39: [39, 1], 1: [1] * 40}[chunk]
    runtime.close()


def test_a_graph_of_the_last_position_alone_gives_every_positions_logits(
    made: tuple[Path, np.ndarray], folder: Path
) -> None:
    (folder / LAST_FILE).replace(folder / MODEL_FILE)
    runtime = OrtRuntime(folder, threads=1)
    runtime._reset(TOKENS.size)
    assert runtime._step(TOKENS).shape[0] == 1
    assert relative(runtime.logits(TOKENS), made[1]) < 1e-4
    runtime.close()


def test_a_graph_below_the_folder_has_the_folders_files(
    made: tuple[Path, np.ndarray], folder: Path
) -> None:
    """The layout of folders on the Hub: configuration and tokenizer above ``onnx/model.onnx``."""
    (folder / "onnx").mkdir()
    for name in (MODEL_FILE, LAST_FILE, DATA_FILE):
        (folder / name).rename(folder / "onnx" / name)
    assert model_file(folder) == folder / "onnx" / MODEL_FILE
    runtime, plain = OrtRuntime(folder, threads=1), OrtRuntime(made[0], threads=1)
    assert np.array_equal(runtime.logits(TOKENS), plain.logits(TOKENS))
    new = runtime.generate(TOKENS.tolist(), 20)
    assert new and new == plain.generate(TOKENS.tolist(), 20)
    assert runtime.vocab_size == plain.vocab_size
    assert runtime._end == plain._end == {2}
    text = "some words"
    assert runtime.detokenize(runtime.tokenize(text)) == text
    runtime.close()
    plain.close()


def test_which_graph_of_a_folder_is_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 0 \*\.onnx files and no model\.onnx"):
        model_file(tmp_path)
    (tmp_path / "one.onnx").touch()
    assert model_file(tmp_path) == model_file(tmp_path / "one.onnx") == tmp_path / "one.onnx"
    (tmp_path / "two.onnx").touch()
    with pytest.raises(InputError, match=r"holds 2 \*\.onnx files and no model\.onnx"):
        model_file(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    assert model_file(tmp_path) == tmp_path / "onnx" / "model.onnx"
    (tmp_path / "model.onnx").touch()
    assert model_file(tmp_path) == tmp_path / "model.onnx"
