"""What allocation strategies measure on the model: sensitivity, learned positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from svdexport.core.lowrank import FactorPair
from svdexport.core.soft_truncation import mask, soft_truncate, stable_reciprocals
from svdexport.models.blocks import InputGroup, discover, select
from svdexport.models.modules import linear_weight
from svdexport.models.sensitivity import Trials, perplexities
from svdexport.models.truncation import learn_positions
from svdexport.recipe.settings import DobiPositions
from tests.unit.test_models import TOKENS, gpt2, llama


def plainly(y: Tensor, position: Tensor, beta: float) -> Tensor:
    u, s, vt = torch.linalg.svd(y, full_matrices=False)
    return u @ torch.diag(s * mask(position, len(s), beta)) @ vt


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_soft_truncation_and_its_gradient_against_torchs_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(*shape, generator=generator, dtype=torch.float64)
    target = torch.randn(*shape, generator=generator, dtype=torch.float64)
    found, expected = [], []
    for function, out in ((soft_truncate, found), (plainly, expected)):
        leaf = y.clone().requires_grad_(True)
        position = torch.tensor(3.1, dtype=torch.float64, requires_grad=True)
        result = function(leaf, position, 2.0)
        (result * target).sum().backward()
        out += [result.detach(), leaf.grad, position.grad]
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-9)


def test_reciprocals_stay_finite_where_singular_values_meet() -> None:
    squares = torch.tensor([4.0, 4.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = stable_reciprocals(squares)
    assert torch.allclose(found, -found.T)
    assert float(found[0, 1]) == pytest.approx(11 / 4)  # the series' 11 terms, over s^2
    assert float(found[0, 2]) == pytest.approx(1 / (4 - 2))
    assert float(found[4, 5]) == pytest.approx(100 / 4)  # 100 in units of the largest
    y = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    soft_truncate(y, torch.tensor(2.0), 10.0).sum().backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


def truncated(model: Any, group: InputGroup, rank: int) -> FactorPair:
    weight = torch.cat([linear_weight(model.get_submodule(m.name)) for m in group.members])
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return FactorPair(vt[:rank], u[:, :rank] * s[:rank])


def perplexity(model: Any) -> float:
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    return float(torch.exp(loss))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_sensitivity_is_the_perplexity_with_one_group_truncated(make: Any) -> None:
    model = make()
    structure = discover(model)
    groups = select(structure, ("re:",), (), group=True)

    def trials_of(block: int) -> Trials:
        chosen = [g for g in groups if g.block == block]
        return [(g, [truncated(model, g, rank) for rank in (2, 9)]) for g in chosen]

    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense, found = perplexities(model, structure, TOKENS, trials_of)
    assert dense == pytest.approx(perplexity(model), rel=1e-5)
    assert set(found) == {g.leader for g in groups}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    group = groups[5]
    expected = make()
    parts = truncated(model, group, 2).dense().split([m.out_features for m in group.members])
    for member, part in zip(group.members, parts, strict=True):
        module = expected.get_submodule(member.name)
        module.weight.data = part.T if type(module).__name__ == "Conv1D" else part
    assert found[group.leader][0] == pytest.approx(perplexity(expected), rel=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_learned_positions_stay_in_range_and_near_the_budget(make: Any) -> None:
    model = make()
    groups = select(discover(model), ("re:",), (), group=True)
    settings = DobiPositions(iterations=6, length=10, rate=1.0)
    torch.manual_seed(0)
    logits = model(TOKENS[:1], use_cache=False).logits
    found = learn_positions(model, groups, TOKENS, 0.5, settings)
    assert torch.equal(model(TOKENS[:1], use_cache=False).logits, logits)  # no hook is left
    assert set(found) == {g.leader for g in groups}
    assert len(set(found.values())) > 2  # they moved apart
    kept = dense = 0.0
    for group in groups:
        rows, columns = sum(m.out_features for m in group.members), group.members[0].in_features
        assert 1.0 <= found[group.leader] < rows * columns / (rows + columns)
        kept += found[group.leader] * (rows + columns)
        dense += rows * columns
    assert kept / dense == pytest.approx(0.5, abs=0.1)


def test_a_group_that_matters_gets_a_higher_position() -> None:
    """On text that the model writes itself; the last block's outputs are scaled to nothing."""
    model = llama(initializer_range=0.2)
    groups = select(discover(model), ("re:mlp.down_proj",), (), group=True)
    with torch.no_grad():
        model.get_submodule(groups[0].leader).weight *= 3.0
        model.get_submodule(groups[-1].leader).weight *= 1e-4
    text = model.generate(
        TOKENS[:, :2], max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0
    )
    settings = DobiPositions(iterations=30, rate=0.5, beta=1.0, ratio_weight=1000.0)
    found = learn_positions(model, groups, text, 0.3, settings)
    assert found[groups[0].leader] > found[groups[-1].leader] + 2
