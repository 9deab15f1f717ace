"""Models that bring Python code: what a trusted one needs, and who may say that it is trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svdexport import api
from svdexport.errors import InputError
from svdexport.runtimes import open_runtime
from tests.unit.tiny_checkpoints import make_model

RECIPE = """\
schema: 1
model: {path: model, trust_remote_code: TRUSTED}
calibration: {samples: 4, length: 32, seed: 1}
compress: {method: svd_llm, budget: {param_ratio: 0.7}, rank_multiple: 8, allocate: uniform}
export:
  - {format: checkpoint}
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""
CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(MARK).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class Own(LlamaForCausalLM):
    config_class = CONFIG
"""


def write_recipe(folder: Path, trusted: bool) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("TRUSTED", str(trusted).lower()))
    return path


def bring_code(folder: Path, mark: Path, known: bool = True) -> None:
    """Give a model code of its own that leaves a file where it is run.

    ``known``: transformers has the architecture without that code too.
    """
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    if not known:
        config |= {"model_type": "own", "architectures": ["Own"]}
        config["auto_map"]["AutoConfig"] = "own.OwnConfig"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        CODE.replace("MARK", repr(str(mark))).replace(
            "CONFIG", "LlamaConfig" if known else "OwnConfig"
        )
    )


@pytest.mark.parametrize("known", [True, False])
def test_a_trusted_model_runs_and_its_checkpoint_has_its_code(tmp_path: Path, known: bool) -> None:
    make_model(tmp_path / "model", "llama")
    bring_code(tmp_path / "model", tmp_path / "ran", known)
    with pytest.raises(InputError, match="trust_remote_code: true"):
        api.run(write_recipe(tmp_path, trusted=False), tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    outcome = api.run(write_recipe(tmp_path, trusted=True), tmp_path / "out")
    assert outcome.result.verdict.word == "pass"
    kept = tmp_path / "out" / "checkpoint"
    assert (kept / "own.py").read_text() == (tmp_path / "model" / "own.py").read_text()
    assert any(row.rank is not None for row in outcome.result.plan)
    trusting = open_runtime(kept, threads=1, context=32, trust_remote_code=True)
    assert type(trusting.model).__name__ == "Own"  # type: ignore[attr-defined]

    with pytest.raises(InputError, match="verify: --trust-remote-code"):
        api.verify(tmp_path / "out", threads=1)
    model = tmp_path / "model"
    again = api.verify(
        tmp_path / "out", quality=True, model=model, threads=1, trust_remote_code=True
    )
    assert again is not None
    assert again.verdict.word == "pass"


def test_a_manifest_cannot_say_that_code_is_trusted(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    out, mark = tmp_path / "out", tmp_path / "ran"
    api.run(write_recipe(tmp_path, trusted=False), out)
    bring_code(tmp_path / "model", mark)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"]["model"]["trust_remote_code"] = True
    (out / "manifest.json").write_text(json.dumps(manifest))
    model = tmp_path / "model"
    with pytest.raises(InputError, match="verify: --trust-remote-code"):
        api.verify(out, quality=True, model=model, threads=1)
    assert not mark.exists()
    api.verify(out, quality=True, model=model, threads=1, trust_remote_code=True)
    assert mark.exists()
