"""The examples of docs/api.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from svdexport import api
from svdexport.errors import RecipeError
from svdexport.models.loader import load_model
from svdexport.models.modules import LowRankLinear
from tests.unit.gguf_models import make_model

DOCS = Path(__file__).parents[2] / "docs"


def test_examples_of_the_api_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "api.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 5
    make_model(tmp_path / "model", "Llama", hidden_size=64, intermediate_size=96)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert names["outcome"].out == (tmp_path / "out" / "small")
    assert names["found"].parity["checkpoint"].passed
    assert names["after"] < names["before"]
    assert torch.isfinite(names["logits"]).all()


def test_every_link_of_the_docs_leads_somewhere() -> None:
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_model_in_memory_becomes_its_checkpoint(tmp_path: Path) -> None:
    """The same pairs as a run makes, biases kept, and a full budget changes nothing."""
    make_model(tmp_path / "model", "Qwen2", hidden_size=64, intermediate_size=96)
    tokens = torch.randint(0, 384, (4, 24), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "model")
    expected = model(tokens).logits
    rows = api.compress_model(model, tokens, param_ratio=0.5, rank_multiple=8, method="svd_llm")
    pairs = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert pairs == {row.name for row in rows if row.rank is not None} != set()
    fresh = load_model(tmp_path / "model")
    for name in pairs:
        module, dense = model.get_submodule(name), fresh.get_submodule(name)
        if dense.bias is not None:
            assert torch.equal(module.bias, dense.bias)
        error = (module.weight - dense.weight).norm() / dense.weight.norm()
        assert 0 < error < 1
    assert not torch.allclose(model(tokens).logits, expected)
    whole = load_model(tmp_path / "model")
    assert all(r.rank is None for r in api.compress_model(whole, tokens, param_ratio=1.0))
    assert torch.equal(whole(tokens).logits, expected)
    assert not whole.training
    api.compress_model(whole.train(), tokens, param_ratio=1.0)
    assert all(module.training for module in whole.modules())
    with pytest.raises(RecipeError, match=r"bfloat16 weights.*model\.float\(\)"):
        api.compress_model(whole.to(torch.bfloat16), tokens)
    with pytest.raises(RecipeError, match="tokens"):
        api.compress_model(fresh, tokens.float())
    with pytest.raises(RecipeError, match="did you mean"):
        api.compress_model(fresh, tokens, allocat="greedy")


@pytest.mark.parametrize(
    "settings",
    [
        {"allocate": "asvd", "allocation": {"ratios": [0.3, 0.6], "length": 16}},
        {"allocate": "dobi_svd", "allocation": {"iterations": 1, "length": 24}},
    ],
)
def test_in_memory_what_is_measured_on_the_model_is_measured(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=64, intermediate_size=96)
    tokens = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "model")
    rows = api.compress_model(
        model, tokens, param_ratio=0.6, method="svd", rank_multiple=4, **settings
    )
    kept = sum(row.params for row in rows) / sum(row.params_dense for row in rows)
    assert kept <= 0.6
    assert torch.isfinite(model(tokens).logits).all()
