"""Closed-form refiners against slow formulas in float64, and low-rank updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdexport.core.alternate import alternate, least_squares, pair_loss
from svdexport.recipe.refiners import Als, Lora, SequentialLs
from svdexport.refine import REFINERS, sequential_ls, training
from svdexport.refine.base import Moments
from svdexport.refine.pairs import balance_pairs, pair_tensors
from tests.unit.refine_models import data
from tests.unit.test_distill import add_biases, mean_divergence, slow_divergence


def positive(size: int, rows: int) -> torch.Tensor:
    x = torch.randn(rows, size, dtype=torch.float64) * torch.logspace(0, -2, size).double()
    return x.T @ x


def setting() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(4)
    weight = torch.randn(9, 12, dtype=torch.float64)
    a, b = torch.randn(4, 12, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    return weight, a, b, positive(12, 60), positive(5, 40), positive(4, 40)


def test_each_step_is_the_exact_minimiser() -> None:
    weight, a, b, h, g1, g2 = setting()
    found = alternate(weight, a, b, h, [g1, g2], iterations=1)
    g = torch.block_diag(g1, g2)
    # The slow way: least squares over all entries of A, then of B, by the Kronecker product.
    root_g, root_h = torch.linalg.cholesky(g).T, torch.linalg.cholesky(h).T
    target = (root_g @ weight @ root_h.T).flatten()
    slow_a = torch.linalg.lstsq(torch.kron(root_g @ b, root_h), target[:, None]).solution
    slow_a = slow_a.view(4, 12)
    slow_b = torch.linalg.lstsq(torch.kron(root_g, root_h @ slow_a.T), target[:, None]).solution
    assert torch.allclose(found.a, slow_a, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.b, slow_b.view(9, 4), rtol=1e-6, atol=1e-8)
    error = root_g @ (weight - found.b @ found.a) @ root_h.T
    assert found.losses[-1] == pytest.approx(float(error.pow(2).sum()), rel=1e-9)
    assert found.losses[0] == pytest.approx(pair_loss(weight, a, b, h, [g1, g2]))


@pytest.mark.parametrize("singular", [False, True])
def test_the_loss_never_grows_and_reaches_the_optimum(singular: bool) -> None:
    weight, a, b, h, g1, g2 = setting()
    if singular:
        h = positive(12, 3)
    found = alternate(weight, a, b, h, [g1, g2], iterations=300)
    assert all(y <= x for x, y in zip(found.losses, found.losses[1:], strict=False))
    root_g = torch.linalg.cholesky(torch.block_diag(g1, g2)).T
    values, vectors = torch.linalg.eigh(h)
    root_h = vectors * values.clamp_min(0).sqrt()
    sigma = torch.linalg.svdvals(root_g @ weight @ root_h)
    total = float(sigma.pow(2).sum())
    assert found.losses[-1] == pytest.approx(float(sigma[4:].pow(2).sum()), abs=1e-6 * total)


def test_least_squares_with_a_pull_towards_what_was() -> None:
    torch.manual_seed(5)
    z, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    b = torch.randn(3, 6, dtype=torch.float64)
    found = least_squares(b, y.T @ z, z.T @ z, 0.25)
    pull = (0.25 * (z.T @ z).diagonal().mean()).sqrt()
    rows = torch.cat([z, pull * torch.eye(6, dtype=torch.float64)])
    slow = torch.linalg.lstsq(rows, torch.cat([y, pull * b.T])).solution.T
    assert torch.allclose(found, slow, atol=1e-10)
    without = least_squares(b, y.T @ z, z.T @ z, 0.0)
    assert torch.allclose(without, torch.linalg.lstsq(z, y).solution.T, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])
def test_als_lowers_the_error_in_the_metric(gradients: bool, tmp_path: Path) -> None:
    """Of every group, and the note says by how much that of all together."""
    given = data(tmp_path, gradients=gradients)
    module, groups = given.student.module, given.groups
    before = pair_tensors(module, groups)
    found = REFINERS["als"].refine(given, Als(iterations=3))
    assert set(found.tensors) == set(before)
    sums = [0.0, 0.0]
    for moments in given.moments():
        for leader, members in groups.items():
            if leader not in moments.inputs:
                continue
            weight = torch.cat(given.teacher().weights(members)).double()
            metric = torch.eye(len(weight), dtype=torch.float64)
            if gradients:  # damped by a tenth of the mean eigenvalue, unless told otherwise
                own = [moments.gradients[name].matrix for name in members]
                added = [g + 0.1 * g.trace() / len(g) * torch.eye(len(g)).double() for g in own]
                metric = torch.block_diag(*added)

            def loss(
                tensors: dict[str, torch.Tensor],
                leader: str = leader,
                members: list[str] = members,
                weight: torch.Tensor = weight,
                metric: torch.Tensor = metric,
                h: torch.Tensor = moments.inputs[leader].matrix,
            ) -> float:
                b = torch.cat([tensors[f"{name}.lr_b.weight"] for name in members]).double()
                error = weight - b @ tensors[f"{leader}.lr_a.weight"].double()
                return float((metric @ error @ h @ error.T).trace())

            losses = loss(before), loss(found.tensors)
            assert losses[1] < losses[0], leader
            sums = [total + one for total, one in zip(sums, losses, strict=True)]
    said = float(found.notes[0].rpartition(" by ")[2].rstrip("%"))
    assert said == pytest.approx(100 * (1 - sums[1] / sums[0]), abs=0.06)  # of one decimal


def test_als_counts_no_error_where_there_is_no_gradient(tmp_path: Path) -> None:
    leader = "model.layers.1.mlp.down_proj"
    alone = data(tmp_path / "alone", gradients=True)
    alone = replace(alone, groups={leader: alone.groups[leader]})
    given = data(tmp_path / "all", gradients=True)

    def moments() -> Iterator[Moments]:
        for found in given.moments():
            for name, moment in found.gradients.items():
                if name != leader:
                    moment.matrix = torch.zeros_like(moment.matrix)
            yield found

    notes = [
        REFINERS["als"].refine(one, Als(iterations=2)).notes
        for one in (alone, replace(given, moments=moments))
    ]
    assert notes[0] == notes[1]


@pytest.mark.parametrize(("ridge", "biases"), [(0.0, False), (0.0, True), (0.5, True)])
def test_sequential_least_squares_are_those_of_the_slow_formula(
    ridge: float, biases: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_ls, "BATCH_TOKENS", 80)  # 5 windows of 16, and 4 at the end
    given = data(tmp_path, rank=4)
    if biases:
        add_biases(given)
    module, teacher = given.student.module, given.teacher().module

    def divergence() -> float:
        with torch.no_grad():
            return float(slow_divergence(module(given.tokens).logits, teacher(given.tokens).logits))

    first = divergence()
    before = pair_tensors(module, given.groups)
    found = REFINERS["sequential_ls"].refine(given, SequentialLs(ridge=ridge))
    assert divergence() < first
    # the inputs of a group depend on those before it alone, which are as they were at its turn
    caught: dict[str, torch.Tensor] = {}
    hooks = []
    for leader, members in given.groups.items():
        inputs = module.get_submodule(leader).register_forward_pre_hook(
            lambda _m, x, key=leader: caught.update({f"{key} x": x[0].flatten(0, 1).double()})
        )
        outputs = [
            teacher.get_submodule(name).register_forward_hook(
                lambda _m, _x, y, key=name: caught.update({f"{key} y": y.flatten(0, 1).double()})
            )
            for name in members
        ]
        hooks += [inputs, *outputs]
    module(given.tokens)
    teacher(given.tokens)
    for hook in hooks:
        hook.remove()
    squares = {"before": 0.0, "after": 0.0, "all": 0.0}
    for leader, members in given.groups.items():
        z = caught[f"{leader} x"] @ found.tensors[f"{leader}.lr_a.weight"].double().T
        pull = (ridge * (z.T @ z).diagonal().mean()).sqrt()
        rows = torch.cat([z, pull * torch.eye(4, dtype=torch.float64)])
        for name in members:
            bias = teacher.get_submodule(name).bias
            y = caught[f"{name} y"] - (0.0 if bias is None else bias.double())
            old = before[f"{name}.lr_b.weight"].double()
            slow = torch.linalg.lstsq(rows, torch.cat([y, pull * old.T])).solution.T
            refitted = found.tensors[f"{name}.lr_b.weight"].double()
            assert torch.allclose(refitted, slow, atol=1e-3), name
            for when, b in (("before", old), ("after", slow), ("all", 0.0 * old)):
                squares[when] += float((y - z @ b.T).square().sum())
    for name in before:
        assert torch.equal(found.tensors[name], before[name]) == name.endswith("lr_a.weight")
    shares = [float(share) for share in found.notes[0].rpartition(", ")[2].split(" -> ")]
    expected = [squares[when] / squares["all"] for when in ("before", "after")]
    assert shares == pytest.approx(expected, abs=1e-4) and shares[1] < shares[0]


def test_low_rank_updates_change_both_sides_one_after_the_other(tmp_path: Path) -> None:
    given = data(tmp_path)
    module = given.student.module
    first = mean_divergence(module, given.tokens)
    config = Lora(steps=20, learning_rate=2e-2, rank=2, precision="float32")
    found = REFINERS["lora"].refine(given, config)
    assert mean_divergence(module, given.tokens) < first
    names = set(module.state_dict())
    assert not any("parametrizations" in name for name in names)
    assert [note.partition(":")[0] for note in found.notes] == ["lora B", "lora A"]
    start = data(tmp_path / "again")

    balance_pairs(start.student.module, start.groups)
    for name, tensor in pair_tensors(start.student.module, start.groups).items():
        change = found.tensors[name].double() - tensor.double()
        sigma = torch.linalg.svdvals(change)
        assert float(sigma[0]) > 1e-3, name
        assert float(sigma[2]) < 1e-4 * float(sigma[0]), name
    again = REFINERS["lora"].refine(data(tmp_path / "third"), config)
    assert all(torch.equal(again.tensors[name], found.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize("killed_in", ["lora B", "lora A"])
def test_updates_that_were_stopped_resume_to_the_same_bytes(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    config = Lora(steps=8, learning_rate=1e-2, rank=2, precision="float32")
    expected = REFINERS["lora"].refine(data(tmp_path / "whole"), config)

    def stop(what: str, done: int, _total: int) -> None:
        if what.startswith(killed_in) and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        REFINERS["lora"].refine(data(tmp_path / "stopped", progress=stop), config)
    seen: list[str] = []
    resumed = data(
        tmp_path / "stopped", progress=lambda what, _done, _total: seen.append(what.split(",")[0])
    )
    found = REFINERS["lora"].refine(resumed, config)
    assert seen.count("lora B") < 4
    assert (seen.count("lora B") == 0) == (killed_in == "lora A")
    assert all(torch.equal(found.tensors[n], expected.tensors[n]) for n in expected.tensors)
    assert found.notes == expected.notes
