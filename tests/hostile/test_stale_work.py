"""What an interrupted run keeps, and what it makes anew because something changed under it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.cli import main
from svdexport.errors import ArtifactError
from svdexport.export import ExportRequest, exporter
from svdexport.export.gguf_importance import FILE_NAME
from svdexport.export.gguf_plain import export_plain
from svdexport.models.loader import load_model, open_source
from svdexport.pipeline import artifacts
from svdexport.recipe import GgufExport, Model
from svdexport.runtimes.gguf_file import GgufFile, adapter_path
from tests.hostile.test_pipeline_faults import RECIPE
from tests.unit import gguf_models
from tests.unit.tiny_checkpoints import make_model


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_model(tmp_path / "m", "llama-tied")
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def markers(recipe: Path) -> dict[str, int]:
    """When each stage was last finished."""
    stages = recipe.with_name(".o.work") / "stages"
    return {path.stem: path.stat().st_mtime_ns for path in stages.glob("*.json")}


def export(recipe: Path) -> list[Path]:
    return api.export(recipe, recipe.with_name("o"))


def test_a_file_that_fails_its_checks_is_exit_3_and_made_anew(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = exporter("checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "check_round_trip", lambda *_: iter(["tensor x: not what was written"]))
        with pytest.raises(ArtifactError, match=r"checkpoint: tensor x: not what was written"):
            export(recipe)
        patch.setattr(
            "sys.argv", ["svdexport", "export", str(recipe), "--out", str(recipe.parent / "o")]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 3
        assert capsys.readouterr().err.strip().endswith("tensor x: not what was written")
        before = markers(recipe)
        assert not any("check" in name and name != "checkpoint" for name in before), before
    made: list[Path] = []
    whole = kind.export

    def counted(request: ExportRequest) -> Any:
        made.append(request.out)
        return whole(request)

    monkeypatch.setattr(kind, "export", counted)
    files = export(recipe)
    assert made == files
    assert markers(recipe)["factors"] == before["factors"]
    assert export(recipe) == files
    assert made == files  # a good one is kept


def test_another_version_of_a_runtime_makes_the_checks_anew(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(recipe)
    before = markers(recipe)
    monkeypatch.setattr(artifacts, "versions", lambda: {"onnxruntime": "another"})
    export(recipe)
    after = markers(recipe)
    changed = {name for name in after if after[name] != before[name]}
    assert changed
    assert all(name.startswith("check") for name in changed), changed


def test_a_gguf_that_changes_is_converted_anew(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    gguf = tmp_path / "model.gguf"
    found = []
    for seed in (0, 1):
        folder = gguf_models.make_model(
            tmp_path / f"m{seed}", "Llama", initializer_range=0.02 + 0.5 * seed
        )
        request = ExportRequest(
            Checkpoint.open(folder), folder, None, gguf, tmp_path, GgufExport(type="F32")
        )
        gguf.unlink(missing_ok=True)
        exporter("gguf").export(request)
        for _ in range(2):
            source = open_source(Model(gguf=gguf), tmp_path / "work")
            state = load_model(source.folder).state_dict()
            expected = load_model(folder).state_dict()
            assert all(torch.allclose(state[n], expected[n], atol=1e-6) for n in expected)
            found.append((source.folder / "config.json").stat().st_mtime_ns)
    assert found[0] == found[1] != found[2] == found[3]


GGUF_RECIPE = """\
schema: 1
model: {path: m}
calibration: {samples: 4, length: 32}
compress: {budget: {param_ratio: 0.7}, rank_multiple: 32}
export: [{format: gguf, type: Q8_0, form: FORM}]
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""


def gguf_recipe(folder: Path, form: str) -> Path:
    gguf_models.make_model(folder / "m", "Llama", hidden_size=128, intermediate_size=192)
    path = folder / "r.yaml"
    path.write_text(GGUF_RECIPE.replace("FORM", form))
    return path


def test_an_edited_chat_template_reaches_the_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    recipe = gguf_recipe(tmp_path, "pairs")
    export(recipe)
    config = tmp_path / "m/tokenizer_config.json"
    edited = json.loads(config.read_text()) | {"chat_template": "EDITED {{ messages }}"}
    config.write_text(json.dumps(edited))
    (file,) = export(recipe)
    assert GgufFile(file).value("tokenizer.chat_template") == "EDITED {{ messages }}"
    assert len(list(recipe.with_name(".o.work").glob("base/base-*.gguf"))) == 1


def test_a_broken_adapter_is_written_anew(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    recipe = gguf_recipe(tmp_path, "stock_lora")
    (file,) = export(recipe)
    adapter = adapter_path(file)
    whole = adapter.read_bytes()
    os.truncate(adapter, 100)
    export(recipe)
    assert adapter.read_bytes() == whole


def test_a_plain_file_follows_its_model_and_its_importance(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder, work, plain = (tmp_path / name for name in ("m", "base", "plain"))
    plain.mkdir()
    gguf_models.make_model(folder, "Llama")

    def made() -> tuple[bytes, int]:
        path = export_plain(folder, None, work, plain, 10**9, 1).path
        return path.read_bytes(), path.stat().st_mtime_ns

    first = made()
    assert made() == first  # a second artifact of the same size takes the same file
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "model.safetensors")
    scaled = made()
    assert scaled[0] != first[0]
    linear = "model.layers.0.mlp.down_proj"
    inputs = torch.rand(weights[f"{linear}.weight"].shape[1])
    save_file({f"{linear}.inputs": inputs}, work / FILE_NAME)
    assert made()[1] != scaled[1]
