"""The papers' recipes as they stand: they are read, and say what their papers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svdexport.allocate import STRATEGIES
from svdexport.factorize import METHODS
from svdexport.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "papers"
SAMPLES = (256, 2048)
# method: allocation, calibration samples and their length, keys of both sections
PAPERS: dict[str, tuple[str, tuple[int, int] | None, dict[str, Any], dict[str, Any]]] = {
    "svd": ("uniform", None, {}, {}),
    "fwsvd": ("uniform", SAMPLES, {}, {}),
    "tfwsvd": ("uniform", SAMPLES, {}, {}),
    "asvd": (
        "asvd",
        (32, 2048),
        {"alpha": 0.5},
        {"ratios": tuple(i / 10 for i in range(1, 10)), "samples": 32, "length": 2048},
    ),
    "svd_llm": ("uniform", SAMPLES, {}, {}),
    "svd_llm_v2": ("svd_llm_v2", SAMPLES, {}, {}),
    "adasvd": ("adacr", SAMPLES, {}, {}),
    "dobi_svd": ("dobi_svd", SAMPLES, {}, {"beta": 10.0, "samples": 256, "length": 2048}),
    "basis_sharing": ("uniform", SAMPLES, {"layers": 2}, {}),
    "lorc": ("lorc", None, {}, {}),
    "emb_ae": ("uniform", None, {}, {}),
}


def test_every_published_method_has_its_recipe() -> None:
    assert (
        {path.stem for path in FOLDER.glob("*.yaml")} == set(PAPERS) == set(METHODS) - {"kfac_svd"}
    )


@pytest.mark.parametrize("method", PAPERS)
def test_a_recipe_says_what_its_paper_does(method: str) -> None:
    path = FOLDER / f"{method}.yaml"
    recipe = load_recipe(path)
    allocate, samples, settings, allocation = PAPERS[method]
    compress = recipe.compress
    assert (compress.method, compress.allocate) == (method, allocate)
    assert settings.items() <= compress.settings.model_dump().items()
    assert allocation.items() <= compress.allocation.model_dump().items()
    # none of them shares an A among linears that share an input, or rounds its ranks
    assert method in ("lorc", "emb_ae") or not compress.group
    assert compress.rank_multiple == 1
    assert not compress.sequential and not recipe.refine and recipe.quantize is None
    if samples is None:
        assert not METHODS[method].needs and not STRATEGIES[allocate].needs
    else:
        calibration = recipe.calibration
        assert (calibration.samples, calibration.length) == samples


@pytest.mark.parametrize("method", PAPERS)
def test_its_head_names_the_paper_and_what_7b_needs(method: str) -> None:
    text = (FOLDER / f"{method}.yaml").read_text()
    head = text[: text.index("schema:")]
    assert all(line.startswith("# ") for line in head.splitlines())
    source = METHODS[method].source
    if "arXiv" in source:
        assert source in " ".join(head.replace("#", " ").split())
    needs = head[head.index("# At 7B: ") :]
    assert "27 GB of weights" in needs or "27 GB in memory" in needs
