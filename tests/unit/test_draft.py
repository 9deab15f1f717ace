"""`init` writes recipes that hold for the model and the target they were asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from svdexport import api
from svdexport.errors import InputError, RecipeError
from svdexport.export import gguf_base
from svdexport.pipeline.draft import TARGETS
from svdexport.recipe import load_recipe
from tests.unit.gguf_models import make_model
from tests.unit.test_plan import LLAMA_70B

SMALL = LLAMA_70B | {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


def folder(place: Path, config: dict[str, object]) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("target", TARGETS)
def test_a_drafted_recipe_can_be_planned(target: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "my model", SMALL)
    out = api.init(model, target, tmp_path / "sub" / "r.yaml")  # type: ignore[arg-type]
    text = out.read_text()
    assert target in text.splitlines()[0] and "1 M parameters" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("# Runs on ")
    assert max(len(line) for line in text.splitlines()) <= 100
    recipe = load_recipe(out)
    assert recipe.model.path is not None and recipe.model.path.resolve() == model
    assert recipe.calibration.length * recipe.calibration.samples >= 2 * 320
    assert max(recipe.speed.prefill) < 256
    forms = {spec.format for spec in recipe.export}
    assert (
        forms
        == {
            "laptop": {"gguf"},
            "phone": {"onnx"},
            "browser": {"onnx"},
            "server": {"gguf", "checkpoint"},
        }[target]
    )
    assert api.plan(out)["exports"][0]["weight_bytes"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_drafted_encoder_asks_for_what_a_run_takes(target: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=320, max_position_embeddings=96,
    )  # fmt: skip
    model = folder(tmp_path / "m", config.to_dict() | {"architectures": ["BertModel"]})
    out = api.init(model, target, tmp_path / "r.yaml")  # type: ignore[arg-type]
    assert max(len(line) for line in out.read_text().splitlines()) <= 100
    with pytest.raises(RecipeError, match=r"calibration\.file: .*calibration\.txt"):
        api.plan(out)
    for name in ("calibration.txt", "evaluation.txt"):
        (tmp_path / name).write_text("Words of the user's own.")
    assert [export["name"].split("-")[:2] for export in api.plan(out)["exports"]] == [
        ["onnx", "int8"]
    ]
    recipe = load_recipe(out)
    assert recipe.calibration.length == max(recipe.speed.prefill) == 96  # all its positions


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_stdout_that_lacks_a_character_changes_no_exit_code(
    tmp_path: Path, more: list[str]
) -> None:
    folder(tmp_path / "modèle", SMALL)
    done = subprocess.run(
        [sys.executable, "-m", "svdexport", "init", "modèle", *more],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = "modèle-laptop.yaml"
    assert (tmp_path / written).is_file()
    if more:
        assert json.loads(done.stdout) == {"recipe": written}
    else:
        assert done.stdout.startswith("mod?le-laptop.yaml: look at it")


def test_a_large_model_gets_four_bits_in_whole_blocks(tmp_path: Path) -> None:
    large = SMALL | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    large |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 128256}
    recipe = load_recipe(api.init(folder(tmp_path / "m", large), "laptop", tmp_path / "r.yaml"))
    assert recipe.export[0].type == "Q4_K"  # type: ignore[union-attr]
    assert recipe.compress.rank_multiple == 256


def test_a_recipe_has_the_models_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = api.init(folder(tmp_path / "Qwen2.5-0.5B", SMALL), "laptop")
    assert out == Path("Qwen2.5-0.5B-laptop.yaml")


def test_of_a_gguf_the_header_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdexport.models import loader

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read")

    make_model(tmp_path / "made", "Llama", hidden_size=128, intermediate_size=160)
    gguf_base.convert(tmp_path / "made", tmp_path / "tiny-1.5.gguf", "f16")
    monkeypatch.setattr(loader, "convert_gguf", read)
    monkeypatch.chdir(tmp_path)
    out = api.init(tmp_path / "tiny-1.5.gguf", "phone")
    assert out == Path("tiny-1.5-phone.yaml")
    assert load_recipe(out).model.gguf == tmp_path / "tiny-1.5.gguf"


def test_nothing_is_overwritten_and_wrong_targets_are_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", SMALL)
    out = api.init(model, "phone", tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="exists"):
        api.init(model, "phone", out)
    with pytest.raises(RecipeError, match="laptop, phone, browser, server"):
        api.init(model, "toaster", tmp_path / "other.yaml")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing: no such folder"):
        api.init(tmp_path / "nothing", "phone", tmp_path / "other.yaml")
    assert not (tmp_path / "other.yaml").exists()


def test_the_name_on_the_hub_is_said_or_found_and_never_guessed(tmp_path: Path) -> None:
    from svdexport.pipeline.run import given_name, hub_name

    out = api.init(folder(tmp_path / "m", SMALL), "phone", tmp_path / "r.yaml")
    cached = tmp_path / "models--owner--small-1B" / "snapshots" / "abc"
    assert hub_name(load_recipe(out), tmp_path / "m") == ""
    assert hub_name(load_recipe(out), cached) == "owner/small-1B"
    (tmp_path / "Small").symlink_to(tmp_path / "m")
    assert given_name(tmp_path / "Small") == "Small"
    assert given_name(tmp_path / "m" / "..") == tmp_path.name
    assert hub_name(load_recipe(out, ["model.hub_name=me/other"]), cached) == "me/other"
    with pytest.raises(RecipeError, match="hub_name"):
        load_recipe(out, ["model.hub_name=../evil"])
