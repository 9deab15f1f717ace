"""Every allocation, and a shared basis, from a recipe to the checkpoint, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdexport import api
from svdexport.allocate import STRATEGIES
from svdexport.checkpoint import Checkpoint
from svdexport.models.loader import load_model
from tests.unit.gguf_models import WORDS, make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {source: file, file: text.txt, samples: 6, length: 48, batch: 4}
compress: {method: svd_llm, budget: {param_ratio: 0.6}, allocate: uniform, rank_multiple: 4}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 48, windows: 2}
"""
QUICK = {
    "asvd": ("compress.allocation.ratios=[0.3, 0.6]", "compress.allocation.length=16"),
    "dobi_svd": ("compress.allocation.iterations=2", "compress.allocation.length=48"),
}


def written_recipe(folder: Path) -> Path:
    """The recipe above in a folder, with its model and text."""
    make_model(folder / "model", "Llama", hidden_size=64, intermediate_size=96)
    (folder / "text.txt").write_text(WORDS * 60)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_recipe(tmp_path_factory.mktemp("methods"))


def checked(recipe: Path, name: str, *overrides: str) -> Checkpoint:
    """The compressed checkpoint: it loads, its logits are finite, and the budget is kept."""
    folder = api.compress(recipe, recipe.parent / name, overrides)
    found, dense = Checkpoint.open(folder), Checkpoint.open(recipe.parent / "model")
    assert found.low_rank
    kept = params = 0
    for linear in found.low_rank:
        pair = found.pair(linear)
        params += dense.tensor(f"{linear}.weight").numel()
        kept += pair.b.numel() + (pair.a.numel() if found.low_rank[linear].group == linear else 0)
    assert kept < 0.75 * params
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits = load_model(folder)(tokens).logits
    assert torch.isfinite(logits).all()
    return found


def test_an_evaluation_text_that_was_changed_is_read_again(recipe: Path) -> None:
    text = recipe.parent / "evaluation.txt"
    read = []
    for words in (WORDS, WORDS.upper()):
        text.write_text(words * 60)
        checkpoint = api.compress(recipe, recipe.parent / "stamped", [f"evaluate.text={text}"])
        read.append(load_file(checkpoint.parent / "tokens.safetensors")["evaluation"])
    assert not torch.equal(*read)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_allocations(recipe: Path, strategy: str) -> None:
    method = "lorc" if strategy == "lorc" else "svd_llm"
    checked(
        recipe,
        f"allocate-{strategy}",
        f"compress.allocate={strategy}",
        f"compress.method={method}",
        *QUICK.get(strategy, ()),
    )


def test_a_shared_basis_is_the_same_in_adjacent_blocks_and_exported_as_ordinary_pairs(
    recipe: Path,
) -> None:
    found = checked(recipe, "basis", "compress.method=basis_sharing")
    first, second = (f"model.layers.{i}" for i in range(2))
    for linear in ("self_attn.q_proj", "mlp.gate_proj"):
        a, b = (found.pair(f"{block}.{linear}").a for block in (first, second))
        assert torch.equal(a, b)
    a, b = (found.pair(f"{block}.mlp.down_proj").a for block in (first, second))
    assert not torch.equal(a, b)
