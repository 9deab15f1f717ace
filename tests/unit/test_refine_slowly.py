"""Refiners against slow formulas: torch's own gradients and AdamW in float64, least squares over
all entries at once.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from svdexport.recipe.refiners import Als, Distill, Lora
from svdexport.refine import REFINERS, RefineData
from svdexport.refine.pairs import balance_pairs, pair_tensors
from svdexport.refine.text import batch_of, split
from tests.unit.refine_models import data, dense_model

RATE, BATCH = 1e-3, 4


def stacked(tensors: dict[str, Tensor], members: list[str]) -> Tensor:
    return torch.cat([tensors[f"{name}.lr_b.weight"] for name in members]).double()


@pytest.mark.parametrize("gradients", [False, True])
def test_als_is_least_squares_over_all_entries_of_a_factor(gradients: bool, tmp_path: Path) -> None:
    """Of every group: after one round, and after many at the optimum of the metric."""
    given = data(tmp_path, gradients=gradients)
    before = pair_tensors(given.student.module, given.groups)
    once = REFINERS["als"].refine(given, Als(iterations=1, damping=0.2)).tensors
    many = (
        REFINERS["als"]
        .refine(data(tmp_path, gradients=gradients), Als(iterations=200, damping=0.2))
        .tensors
    )
    seen = 0
    for moments in given.moments():
        for leader, members in given.groups.items():
            if leader not in moments.inputs:
                continue
            seen += 1
            weight = torch.cat(given.teacher().weights(members)).double()
            h = moments.inputs[leader].matrix
            metric = torch.eye(len(weight), dtype=torch.float64)
            if gradients:
                found = [moments.gradients[name].matrix for name in members]
                damped = [g + 0.2 * g.trace() / len(g) * torch.eye(len(g)).double() for g in found]
                metric = torch.block_diag(*damped)
            left = torch.linalg.cholesky(metric).T
            values, vectors = torch.linalg.eigh(h)
            right = (vectors * values.clamp_min(0).sqrt()).T
            target = (left @ weight @ right.T).flatten()[:, None]
            b = stacked(before, members)
            slow_a = torch.linalg.lstsq(torch.kron(left @ b, right), target).solution
            slow_a = slow_a.view(b.shape[1], -1)
            slow_b = torch.linalg.lstsq(torch.kron(left, right @ slow_a.T), target).solution
            product = stacked(once, members) @ once[f"{leader}.lr_a.weight"].double()
            slow = slow_b.view(b.shape) @ slow_a
            scale = float((left @ weight @ right.T).norm())
            assert float((left @ (product - slow) @ right.T).norm()) < 1e-4 * scale
            product = stacked(many, members) @ many[f"{leader}.lr_a.weight"].double()
            error = float((left @ (weight - product) @ right.T).square().sum())
            sigma = torch.linalg.svdvals(left @ weight @ right.T)[b.shape[1] :]
            assert error == pytest.approx(float(sigma.square().sum()), abs=1e-3 * scale**2)
    assert seen == len(given.groups)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    return (p * (p / q).log()).sum(-1).mean()


def trained(
    given: RefineData,
    module: torch.nn.Module,
    steps: int,
    parameters: list[Tensor],
    weights: object,
) -> None:
    """AdamW in float64 on the mean divergence, by a cosine, the whole gradient's norm at most 1.

    ``weights()`` gives the tensors that take the place of the module's own.
    """
    windows, _ = split(given.tokens, "refine")
    teacher = dense_model().double()
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        tokens = windows[batch_of(step, len(windows), BATCH, 0)]
        logits = functional_call(module, weights(), (tokens,)).logits  # type: ignore[operator]
        loss = divergence(logits, teacher(tokens).logits)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None])
        share = min(1.0, 1.0 / float(norm.sum().sqrt()))
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad *= share
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()


def near(found: dict[str, Tensor], slow: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The same change of every tensor, to a hundredth of it."""
    assert set(found) == set(slow)
    for name, value in slow.items():
        change = value.detach() - start[name]
        assert float(change.abs().max()) > RATE / 2, name
        error = (found[name].double() - value.detach()).norm()
        assert float(error) < 0.01 * float(change.norm()), name


def test_distillation_is_adamw_on_the_mean_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 windows of a batch of 4 in a pass, and then 1
    monkeypatch.setattr("svdexport.refine.logits.MICRO_TOKENS", 48)
    config = Distill(steps=4, batch=BATCH, learning_rate=RATE, warmup=0.0, precision="float32")
    found = REFINERS["distill"].refine(data(tmp_path / "1"), config)
    assert "best at step 4" in found.notes[0]
    given = data(tmp_path / "2")
    module = given.student.module.double()
    balance_pairs(module, given.groups)
    start = {name: value.double() for name, value in pair_tensors(module, given.groups).items()}
    slow = {name: value.clone().requires_grad_(True) for name, value in start.items()}
    trained(given, module, 4, list(slow.values()), lambda: slow)
    near(found.tensors, slow, start)


def test_lora_trains_and_merges_all_b_and_then_all_a(tmp_path: Path) -> None:
    """Each side as B_0 + up down, (m, r) (r, n), with ``up`` zero at first and ``down`` by seed."""
    config = Lora(steps=6, rank=2, batch=BATCH, learning_rate=RATE, warmup=0.0, precision="float32")
    found = REFINERS["lora"].refine(data(tmp_path / "1"), config)
    assert ["best at step 3" in note for note in found.notes] == [True, True]
    given = data(tmp_path / "2")
    module = given.student.module.double()
    balance_pairs(module, given.groups)
    start = {name: value.double() for name, value in pair_tensors(module, given.groups).items()}
    now = dict(start)
    for side, ending in enumerate(("lr_b.weight", "lr_a.weight")):
        generator = torch.Generator().manual_seed(side)
        ups, downs = {}, {}
        for name in (name for name in now if name.endswith(ending)):
            rows, columns = now[name].shape
            down = torch.randn((2, columns), generator=generator).double() / columns**0.5
            downs[name] = down.requires_grad_(True)
            ups[name] = torch.zeros((rows, 2), dtype=torch.float64, requires_grad=True)

        def merged(
            now: dict[str, Tensor] = now,
            ups: dict[str, Tensor] = ups,
            downs: dict[str, Tensor] = downs,
        ) -> dict[str, Tensor]:
            return now | {name: now[name] + ups[name] @ downs[name] for name in ups}

        trained(given, module, 3, [*ups.values(), *downs.values()], merged)
        now = {name: value.detach() for name, value in merged().items()}
        if ending == "lr_b.weight":  # no A has moved yet
            assert all(torch.equal(now[n], start[n]) == n.endswith("lr_a.weight") for n in now)
    for name, value in now.items():
        change = value - start[name]
        error = (found.tensors[name].double() - value).norm()
        assert float(change.norm()) > 0 and float(error) < 0.02 * float(change.norm()), name
