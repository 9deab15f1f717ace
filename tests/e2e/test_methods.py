"""Every allocation, and a shared basis, from a recipe to the checkpoint, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
# the multiples of 4 nearest to 0.6 m n / (m + n), with the rows of all that share an input
UNIFORM = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 24),  # of 128 x 64
    "o_proj": 20,  # of 64 x 64
    **dict.fromkeys(("gate_proj", "up_proj"), 28),  # of 192 x 64
    "down_proj": 24,  # of 64 x 96
}
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


def planned(recipe: Path, name: str) -> list[dict[str, Any]]:
    """The plan of a compression: a row for each linear that the method is for."""
    plan: list[dict[str, Any]] = json.loads(
        (recipe.parent / f".{name}.work" / "plan.json").read_text()
    )
    return plan


def checked(recipe: Path, name: str, *overrides: str) -> Checkpoint:
    """The compressed checkpoint: it loads, its logits are finite, and it keeps 0.6 of what the
    method is for, up to half a step of 4 ranks for each A."""
    folder = api.compress(recipe, recipe.parent / name, overrides)
    found, dense = Checkpoint.open(folder), Checkpoint.open(recipe.parent / "model")
    assert found.low_rank
    kept = params = step = 0
    for linear in (row["name"] for row in planned(recipe, name)):
        weight = dense.tensor(f"{linear}.weight")
        params += weight.numel()
        if linear not in found.low_rank:
            kept += weight.numel()
            continue
        pair, leads = found.pair(linear), found.low_rank[linear].group == linear
        kept += pair.b.numel() + (pair.a.numel() if leads else 0)
        step += weight.shape[0] + (weight.shape[1] if leads else 0)
    assert kept <= 0.6 * params + 4 / 2 * step
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
    plan = planned(recipe, f"allocate-{strategy}")
    ranks = {row["name"]: row["rank"] for row in plan}
    assert len(ranks) == (4 if strategy == "lorc" else 14)  # LoRC's are k and v, each alone
    same = {name: 12 if strategy == "lorc" else UNIFORM[name.rpartition(".")[2]] for name in ranks}
    assert (ranks == same) == (strategy == "uniform")
    kept = sum(row["params"] for row in plan) / sum(row["params_dense"] for row in plan)
    assert 0.5 < kept <= 0.6


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
