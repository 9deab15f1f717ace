"""Form, rank and type of every matrix for a file of so many bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from svdexport import api
from svdexport.allocate.by_bytes import Option, choose
from svdexport.core.decompose import decompose
from svdexport.core.gauge import in_even_gauge, mixed
from svdexport.core.gptq import GptqConfig, gptq, gptq_pair, relative_error, round_to_nearest
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.lowrank import FactorPair
from svdexport.core.noise import noise_model, relative_noise
from svdexport.errors import RecipeError
from svdexport.pipeline import vocabulary
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Quantize, load_recipe
from tests.unit.gguf_models import load, make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 6, length: 64, seed: 1}
compress: {budget: {bytes: BYTES}}
quantize: {algorithm: gptq}
export: [{format: gguf, type: mixed}]
evaluate: {context: 48, windows: 2}
"""


def random_options(seed: int) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    made = {}
    for part in range(4):
        sizes = np.sort(rng.integers(10, 200, 4))
        losses = np.sort(rng.random(4))[::-1]
        made[str(part)] = [
            Option(int(s), float(x), i, ("t",))
            for i, (s, x) in enumerate(zip(sizes, losses, strict=True))
        ]
    return made


@pytest.mark.parametrize("seed", range(8))
def test_choice_fits_and_is_near_the_best_of_all(seed: int) -> None:
    options = random_options(seed)
    smallest = sum(min(o.bytes for o in found) for found in options.values())
    budget = smallest + 150
    chosen = choose(options, budget)
    assert sum(o.bytes for o in chosen.values()) <= budget
    best = min(
        sum(o.loss for o in combination)
        for combination in itertools.product(*options.values())
        if sum(o.bytes for o in combination) <= budget
    )
    worst = sum(max(o.loss for o in found) for found in options.values())
    assert sum(o.loss for o in chosen.values()) <= best + 0.25 * (worst - best)
    with pytest.raises(RecipeError, match="bytes too few"):
        choose(options, smallest - 1)


def test_predicted_losses_are_those_of_the_quantiser() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    mix = torch.randn(128, 128, generator=generator) * torch.arange(1, 129) ** -0.5
    x = torch.randn(2000, 128, generator=generator) @ mix
    h = (x.T @ x).double()
    y = torch.randn(400, 96, generator=generator) * torch.linspace(0.5, 2, 96)
    g = (y.T @ y).double()
    metric = g + 0.1 * g.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    found = in_even_gauge(decompose([weight], h, [g]), h)
    model = noise_model([weight], found, h, [g], damping=0.01, output_damping=0.1)

    def loss(residual: torch.Tensor) -> float:
        r = residual.double()
        return float((metric @ r @ h * r).sum())

    for name in ("Q8_0", "Q4_0"):
        grid, config = GRIDS[name], GptqConfig(0.01, sweeps=0)
        dense = loss(gptq(weight, h, grid, config).values - weight)
        assert dense == pytest.approx(relative_noise(name) * model.dense, rel=0.5)
        pair = FactorPair(*mixed(found.a[:64], found.b[:, :64]))
        a, b = gptq_pair(pair, h, grid, grid, config)
        noise = relative_noise(name) * float(model.a[63] + model.b[63])
        assert loss(b.values @ a.values - pair.dense()) == pytest.approx(noise, rel=0.6)


@pytest.mark.slow
def test_the_file_has_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    sizes = {}
    for budget in (290_000, 400_000):
        path = tmp_path / f"r{budget}.yaml"
        path.write_text(RECIPE.replace("BYTES", str(budget)))
        (file,) = api.export(path, tmp_path / str(budget), reporter=Reporter(quiet=True))
        sizes[budget] = file.stat().st_size
        work = tmp_path / f".{budget}.work"
        types = json.loads((work / "types.json").read_text())
        assert budget * 0.93 <= sizes[budget] <= budget
        assert "model.embed_tokens.weight" in types
        checks = [json.loads(p.read_text()) for p in (work / "checks").glob("*.json")]
        assert checks
        assert not any(check["problems"] for check in checks)


@pytest.mark.slow
def test_only_the_types_that_are_given_are_chosen(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("BYTES", "400000, types: [IQ4_NL, Q8_0]"))
    api.export(path, tmp_path / "out", reporter=Reporter(quiet=True))
    types = json.loads((tmp_path / ".out.work" / "types.json").read_text())
    assert set(types.values()) == {"IQ4_NL", "Q8_0"}
    path.write_text(RECIPE.replace("BYTES", "400000, types: [Q4_K]"))
    with pytest.raises(RecipeError, match="fill no block of any of them; add one"):
        api.export(path, tmp_path / "none", reporter=Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"type: mixed": "type: Q4_0"}, "needs one export"),
        ({"quantize: {algorithm: gptq}\n": ""}, "quantize section"),
        ({"{budget": "{method: svd_llm, budget"}, "method: kfac_svd"),
        ({"bytes: BYTES": "bytes: 1MB, param_ratio: 0.5"}, "exactly one of"),
        ({"bytes: BYTES": "param_ratio: 0.5, types: [Q4_0]"}, "types is for a budget in bytes"),
        ({"bytes: BYTES": "param_ratio: 0.5"}, "type mixed needs"),
    ],
)
def test_what_a_byte_budget_needs_is_said(
    tmp_path: Path, changes: dict[str, str], word: str
) -> None:
    (tmp_path / "model").mkdir()
    text = RECIPE
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / "r.yaml"
    path.write_text(text.replace("BYTES", "1MB"))
    with pytest.raises(RecipeError, match=word):
        load_recipe(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_rounded_in_the_metric_of_its_inputs(tmp_path: Path, tied: bool) -> None:
    model = load(make_model(tmp_path, "Llama", tie_word_embeddings=tied))
    tokens = torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    inputs = vocabulary.head_inputs(model, tokens)
    hidden = model(tokens, output_hidden_states=True).hidden_states[-1].detach().double()
    flat = hidden.reshape(-1, hidden.shape[-1])
    assert inputs is not None
    torch.testing.assert_close(inputs, flat.T @ flat, rtol=1e-4, atol=1e-4)

    table, *head = vocabulary.vocabulary(model)
    assert [table, *head] == ["model.embed_tokens", *([] if tied else ["lm_head"])]
    weight = model.get_submodule(table).weight.detach()
    nearest = round_to_nearest(weight, None, GRIDS["IQ4_NL"])
    found = vocabulary.rounded(model, table, "IQ4_NL", Quantize(), inputs)
    assert torch.equal(found.values, nearest.values) is not tied
    plain = vocabulary.rounded(model, table, "IQ4_NL", Quantize(algorithm="rtn"), inputs)
    assert torch.equal(plain.values, nearest.values)
    read = model.get_output_embeddings().weight.detach()
    best = vocabulary.rounded(model, [table, *head][-1], "IQ4_NL", Quantize(), inputs)
    by_rounding = round_to_nearest(read, None, GRIDS["IQ4_NL"]).values
    assert best.error < 0.8 * relative_error(read, by_rounding, inputs)
    assert torch.equal(weight, model.get_submodule(table).weight)
