"""Factors made in sequence: the closed form, the walk, and what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdexport.core.moments import CrossMoments
from svdexport.core.sequence import sequence_target
from svdexport.models.blocks import discover, select
from svdexport.models.sequence import Walk
from svdexport.models.weights import Weights
from tests.unit.test_models import gpt2, llama


@pytest.mark.parametrize("mix", [0.0, 0.5, 2.0])
def test_the_target_is_the_least_squares_solution(
    mix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdexport.core.moments._CHUNK", 5)  # of the rows, and of the 12 channels
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 12, generator=generator)
    y = x + 0.3 * torch.randn(400, 12, generator=generator)
    weight = torch.randn(7, 12, generator=generator)
    moments = CrossMoments.of([x[:150], x[150:]], [y[:150], y[150:]])
    target, metric = sequence_target(weight, moments, mix)
    # the same problem as one tall system of equations, in float64
    rows = torch.cat([y.double(), mix**0.5 * x.double()])
    outputs = torch.cat([x.double(), mix**0.5 * x.double()]) @ weight.double().T
    slow = torch.linalg.lstsq(rows, outputs).solution.T
    assert torch.allclose(target, slow, atol=2e-3)
    assert torch.allclose(metric, rows.T @ rows, rtol=1e-5, atol=1e-3)


def test_without_changes_before_it_a_layer_stays_as_it_is() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    target, _ = sequence_target(weight, CrossMoments.of([x], [x]), 1.0)
    assert torch.allclose(target.float(), weight, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_walk_shows_each_group_what_the_changed_model_gives_it(
    make: object, tmp_path: Path
) -> None:
    model = make()  # type: ignore[operator]
    structure = discover(model)
    groups = select(structure, ("re:.*",), ("lm_head",), True)
    tokens = torch.randint(0, 90, (5, 16), generator=torch.Generator().manual_seed(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = {}

    def halve(group, weights, moments):  # type: ignore[no-untyped-def]
        seen[group.leader] = moments
        return [weight / 2 for weight in weights]

    walk = Walk(Weights(model), structure, groups, tokens, batch=2, scratch=tmp_path)
    assert list(walk.run(halve, lambda *_: None)) == [0, 1, 2]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert list(tmp_path.iterdir()) == []
    # the inputs of the last group, from whole models
    last = groups[-1].leader
    inputs = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for group in groups[: len(groups) - 1]:
                for member in group.members:
                    module = model.get_submodule(member.name)
                    module.weight.copy_(before[f"{member.name}.weight"] * scale)
            rows = []
            hook = model.get_submodule(last).register_forward_pre_hook(
                lambda _m, args, rows=rows: rows.append(args[0].flatten(0, 1))
            )
            model(input_ids=tokens)
            hook.remove()
        inputs.append(rows[0].double())
    x, y = inputs
    assert not torch.allclose(x, y)
    moments = seen[last]
    for found, slow in (
        (moments.original, x.T @ x),
        (moments.compressed, y.T @ y),
        (moments.cross, x.T @ y),
    ):
        assert torch.allclose(found, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))
