"""Gradients of tokens that the model draws itself, beside those of the text's tokens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdexport import api
from svdexport.core.moments import Statistic, mean_shape
from svdexport.models.blocks import discover, tail_gradients
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.pipeline.factors import statistics
from svdexport.recipe import load_recipe
from tests.unit.test_models import TOKENS, gpt2, llama
from tests.unit.tiny_checkpoints import make_model

BOTH: tuple[Statistic, ...] = ("inputs", "gradients", "sampled_gradients")
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20
RECIPE = """\
schema: 1
model: {path: m}
calibration: {source: file, file: text.txt, samples: 4, length: 24, seed: 5}
compress: {settings: {labels: both}, budget: {param_ratio: 0.7}, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 24, windows: 2}
"""


def collected(
    model: Any,
    scratch: Path,
    wanted: Collection[Statistic] = BOTH,
    batch: int = 4,
    **more: Any,
) -> list[BlockMoments]:
    structure = discover(model)
    return list(
        calibrate(model, structure, TOKENS, batch=batch, statistics=wanted, scratch=scratch, **more)
    )


def one_pass(model: Any, seed: int) -> dict[str, Tensor]:
    """Moments of the gradients for drawn tokens: sample by sample, the whole model in float64."""
    with torch.no_grad():
        probabilities = model(TOKENS, use_cache=False).logits[:, :-1].softmax(dim=-1)
    found: dict[str, Tensor] = {}
    model = model.double()
    for linear in discover(model).linears():

        def note(_m: Any, _a: Any, out: Tensor, name: str = linear.name) -> None:
            def add(g: Tensor) -> None:
                found[name] = found.get(name, 0) + g[0].T @ g[0]

            out.register_hook(add)  # type: ignore[no-untyped-call]

        model.get_submodule(linear.name).register_forward_hook(note)
    model.get_input_embeddings().weight.requires_grad_(True)
    for index, sample in enumerate(TOKENS):
        sampler = torch.Generator().manual_seed((seed << 20) + index)
        labels = torch.multinomial(probabilities[index], 1, generator=sampler)[:, 0]
        logits = model(sample[None], use_cache=False).logits[0, :-1]
        (-logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels].sum()).backward()
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
def test_their_moments_are_those_of_one_pass(make: Any, tmp_path: Path) -> None:
    expected = one_pass(make(), 3)
    alone = {m.block: m for m in collected(make(), tmp_path, ("inputs", "gradients"))}
    for moments in collected(make(), tmp_path, seed=3):
        assert moments.sampled_gradients.keys() == moments.gradients.keys()
        for name, moment in moments.sampled_gradients.items():
            wanted = expected[name]
            assert torch.allclose(moment.matrix, wanted, atol=1e-4 * float(wanted.max()))
            text = alone[moments.block].gradients[name].matrix
            assert torch.equal(moments.gradients[name].matrix, text)
            assert not torch.allclose(text, wanted, atol=0.01 * float(wanted.max()))
        assert not alone[moments.block].sampled_gradients
    assert not list(tmp_path.iterdir())


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def matrices(**more: Any) -> list[Tensor]:
        found = collected(llama(), tmp_path, **more)
        return [m.matrix for block in found for m in block.sampled_gradients.values()]

    first = matrices(batch=6, seed=1)
    for one, same in zip(first, matrices(batch=1, seed=1), strict=True):
        assert torch.allclose(one, same, atol=1e-5 * float(one.max()))
    assert all(map(torch.equal, first, matrices(batch=6, seed=1)))
    assert not any(map(torch.equal, first, matrices(batch=6, seed=2)))


def test_their_mean_over_many_draws_is_zero() -> None:
    """The score of a distribution has no mean under that distribution; the text's has one."""
    model, hidden = llama(), torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    structure, draws = discover(model), 400
    found = [
        tail_gradients(model, structure, TOKENS[:1], hidden, torch.Generator().manual_seed(number))
        for number in range(draws)
    ]
    text, sampled = (torch.stack(rows) for rows in zip(*found, strict=True))
    assert torch.equal(text[0], tail_gradients(model, structure, TOKENS[:1], hidden)[0])
    assert torch.equal(text[0], text[-1])
    spread = float(sampled.square().sum(dim=0).mean().sqrt()) / draws  # of the mean, if it is 0
    assert float(sampled.mean(dim=0).square().mean().sqrt()) < 1.2 * spread
    assert float(text.mean(dim=0).square().mean().sqrt()) > 5 * spread


def test_mean_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = x.T @ x, 100 * y.T @ y
    mean = mean_shape(first, second)
    shapes = first / first.trace() + second / second.trace()
    assert torch.allclose(mean, first.trace() * shapes / 2)
    assert torch.isclose(mean.trace(), first.trace())
    assert torch.equal(mean_shape(first, torch.zeros(5, 5)), first)


def test_a_recipe_takes_the_mean_of_both(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama-tied")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT)
    path = tmp_path / "r.yaml"
    assert statistics(load_recipe(path)) == set(BOTH)
    assert statistics(load_recipe(path, ["compress.settings.labels=text"])) == set(BOTH[:2])
    api.compress(path, tmp_path / "a", ["compress.sequential=true"])
    work = tmp_path / ".a.work"
    tokens = load_file(work / "tokens.safetensors")["calibration"]
    found = calibrate(
        model, discover(model), tokens, batch=8, statistics=BOTH, scratch=tmp_path, seed=5
    )
    for moments in found:
        kept = load_file(work / "factors" / f"block_{moments.block:04d}.safetensors")
        for name, moment in moments.gradients.items():
            mean = mean_shape(moment.matrix, moments.sampled_gradients[name].matrix)
            kept_mean = kept[f"{name}.gradient"].double()
            assert torch.allclose(kept_mean, mean, atol=1e-5 * float(mean.max()))
            assert not torch.allclose(kept_mean, moment.matrix, atol=0.01 * float(mean.max()))
