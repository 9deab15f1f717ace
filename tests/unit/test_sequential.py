"""``compress.sequential``: every group is the optimum for what the model before it gives it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svdexport.allocate import Allocation
from svdexport.models.blocks import discover, select
from svdexport.models.weights import Weights
from svdexport.pipeline.compress import GroupPlan
from svdexport.pipeline.factor_files import factors_file, save_factors
from svdexport.pipeline.factors import kind
from svdexport.pipeline.sequential import refactor_in_sequence
from svdexport.recipe import Recipe
from tests.unit.test_decompose import damped, moment, root, slow
from tests.unit.test_models import llama

# None: the group stays dense, and is fitted as well
RANKS = {"q_proj+k_proj+v_proj": 8, "o_proj": 6, "gate_proj+up_proj": None, "down_proj": 5}
DAMPING = 0.2


def inputs_of(model: Any, linear: str, tokens: Tensor) -> Tensor:
    """Rows (samples x length, n) that a whole model calls a linear with."""
    rows: list[Tensor] = []
    hook = model.get_submodule(linear).register_forward_pre_hook(
        lambda _module, args: rows.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    (found,) = rows
    return found


def target_of(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W' with the least ||W x - W' y||^2 + ||W x - W' x||^2 over the rows x of the dense model and
    y of the changed one, pulled to W by a ridge of 1e-4 of the metric's mean eigenvalue; and the
    metric. As one tall system of equations."""
    rows, outputs = torch.cat([y, x]), torch.cat([x, x]) @ weight.T
    metric = rows.T @ rows
    pull = (1e-4 * metric.diagonal().mean()).sqrt() * torch.eye(len(metric), dtype=x.dtype)
    tall = torch.linalg.lstsq(torch.cat([rows, pull]), torch.cat([outputs, pull @ weight.T]))
    return tall.solution.T, metric


@pytest.mark.parametrize("gradients", [False, True])
def test_every_group_is_fitted_to_the_groups_before_it(gradients: bool, tmp_path: Path) -> None:
    """Against full decompositions in float64, and inputs that whole models give."""
    model = llama(num_hidden_layers=2, initializer_range=0.1)
    structure = discover(model)
    groups = select(structure, ("re:.*",), ("lm_head",), True)
    assert [kind(group) for group in groups] == list(RANKS) * 2
    linears = [member for group in groups for member in group.members]
    sizes = {member.name: member.out_features for member in linears}
    weighting = {name: moment(m, 3 * m, i).float() for i, (name, m) in enumerate(sizes.items())}
    for block in range(2):
        kept = {f"{name}.gradient": g for name, g in weighting.items() if gradients}
        save_factors(kept | {"none": torch.zeros(1)}, factors_file(tmp_path, block))
    recipe = Recipe.model_validate(
        {
            "schema": 1,
            "model": {"path": "m"},
            "calibration": {"batch": 3},
            "compress": {
                "method": "kfac_svd",
                "budget": {"param_ratio": 0.5},
                "damping": DAMPING,
                "sequential": True,
            },
            "export": [{"format": "checkpoint"}],
        },
        strict=False,
    )
    plan = [GroupPlan(group, Allocation(RANKS[kind(group)]), None, None) for group in groups]
    tokens = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(1))
    made: dict[str, Tensor] = {}
    for tensors in refactor_in_sequence(
        recipe, Weights(model), structure, plan, tokens, tmp_path, lambda *_: None
    ):
        made |= {name: tensor.double() for name, tensor in tensors.items()}

    dense = copy.deepcopy(model).double()
    changed = copy.deepcopy(dense)
    expected_names = set()
    for index, (group, entry) in enumerate(zip(groups, plan, strict=True)):
        names, rank = [member.name for member in group.members], entry.allocation.rank
        weight = torch.cat([dense.get_submodule(name).weight for name in names])
        x, y = (inputs_of(one, group.leader, tokens) for one in (dense, changed))
        target, metric = target_of(weight, x, y)
        if index == 0:  # nothing is before it: its own weights and inputs
            assert torch.equal(x, y)
            target, metric = weight, x.T @ x
        g = torch.block_diag(*(damped(weighting[name].double(), DAMPING) for name in names))
        if rank is None:
            expected = target
            expected_names |= {f"{name}.weight" for name in names}
            parts = [made[f"{name}.weight"] for name in names]
        else:
            expected, _ = slow(target, metric, g if gradients else None, rank)
            first = f"{group.leader}.lr_a.weight"
            expected_names |= {first, *(f"{name}.lr_b.weight" for name in names)}
            assert made[first].shape == (rank, weight.shape[1])
            parts = [made[f"{name}.lr_b.weight"] @ made[first] for name in names]
        # in the norm that the optimum is of: what no input shows is not determined
        left = root(g) if gradients and rank is not None else torch.eye(len(weight)).double()
        gap = left @ (torch.cat(parts) - expected) @ root(metric)
        size = (left @ weight @ root(metric)).norm()
        assert float(gap.norm() / size) < 1e-4, group.leader
        for name, part in zip(names, parts, strict=True):
            changed.get_submodule(name).weight.data = part
    assert set(made) == expected_names
