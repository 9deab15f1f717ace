"""From a model to its compressed checkpoint: calibrate, factorise, allocate, assemble."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdexport.allocate import STRATEGIES, Allocation, Candidate
from svdexport.checkpoint import PairSpec
from svdexport.core.decompose import Decomposition, relative_errors
from svdexport.core.lowrank import break_even_rank
from svdexport.factorize import METHODS, GroupData, split_outputs
from svdexport.files import write_atomic
from svdexport.models.blocks import InputGroup, Structure, select
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.modules import linear_weight
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Recipe
from svdexport.report.result import PlanRow


@dataclass(frozen=True)
class GroupPlan:
    """A group of linears with its rank (None: dense, with the reason) and predicted errors."""

    group: InputGroup
    allocation: Allocation
    predicted_error: float | None
    relative_error: float | None


def chosen_groups(recipe: Recipe, structure: Structure) -> list[InputGroup]:
    """Groups of linears that the recipe compresses."""
    compress = recipe.compress
    return select(structure, compress.targets, compress.ignore, compress.group)


def factors_file(folder: Path, block: int) -> Path:
    """File of the nested factors of one block."""
    return folder / f"block_{block:04d}.safetensors"


def factorize_blocks(
    recipe: Recipe,
    structure: Structure,
    model: Any,
    tokens: Tensor,
    folder: Path,
    reporter: Reporter,
) -> None:
    """Decompose every chosen group, block by block; one file of nested factors per block."""
    folder.mkdir(parents=True, exist_ok=True)
    method = METHODS[recipe.compress.method]
    groups = chosen_groups(recipe, structure)
    for moments in _moments(recipe, structure, model, tokens, folder, reporter):
        tensors: dict[str, Tensor] = {}
        for group in groups:
            if group.block != moments.block:
                continue
            data = _group_data(recipe, model, group, moments)
            found = method.factorize(data)
            errors = relative_errors(data.weights, found, data.inputs)
            tensors |= _pack(group.leader, found, errors)
            tensors |= _importance(group, found, moments)
        _save(tensors, factors_file(folder, moments.block))


def _moments(
    recipe: Recipe,
    structure: Structure,
    model: Any,
    tokens: Tensor,
    folder: Path,
    reporter: Reporter,
) -> Iterator[BlockMoments]:
    needs = METHODS[recipe.compress.method].needs
    if needs == "nothing":
        for index in range(len(structure.blocks)):
            yield BlockMoments(index, {}, {})
            reporter.progress("factorize", index + 1, len(structure.blocks))
        return
    yield from calibrate(
        model,
        structure,
        tokens,
        batch=recipe.calibration.batch,
        gradients=needs == "gradients",
        scratch=folder,
        progress=reporter.progress,
    )


def _group_data(recipe: Recipe, model: Any, group: InputGroup, moments: BlockMoments) -> GroupData:
    names = [member.name for member in group.members]
    weights = tuple(linear_weight(model.get_submodule(name)) for name in names)
    rows = sum(member.out_features for member in group.members)
    inputs = moments.inputs[names[0]].matrix if names[0] in moments.inputs else None
    gradients = None
    if moments.gradients:
        gradients = tuple(moments.gradients[name].matrix for name in names)
    limit = max(1, break_even_rank(rows, group.members[0].in_features))
    return GroupData(weights, inputs, gradients, limit, recipe.compress.damping)


def _pack(leader: str, found: Decomposition, errors: Tensor) -> dict[str, Tensor]:
    return {
        f"{leader}.a": found.a,
        f"{leader}.b": found.b,
        f"{leader}.energies": found.energies,
        f"{leader}.errors": errors,
        f"{leader}.damping": torch.tensor(found.damping, dtype=torch.float64),
    }


def _importance(
    group: InputGroup, found: Decomposition, moments: BlockMoments
) -> dict[str, Tensor]:
    """Mean squares of the input channels (n_in,) and of A x (k,), for quantisers; or nothing."""
    moment = moments.inputs.get(group.leader)
    if moment is None:
        return {}
    h = moment.matrix / max(1, moment.rows)
    inputs = h.diagonal().float().contiguous()
    a = found.a.to(h.dtype)
    rank = ((a @ h) * a).sum(dim=1).float()
    return {f"{m.name}.inputs": inputs.clone() for m in group.members} | {
        f"{group.leader}.rank": rank
    }


def importance(structure: Structure, folder: Path) -> dict[str, Tensor]:
    """What ``_importance`` left in the factor files, of all blocks."""
    found: dict[str, Tensor] = {}
    for block in range(len(structure.blocks)):
        path = factors_file(folder, block)
        if path.exists():
            tensors = load_file(path)
            found |= {k: v for k, v in tensors.items() if k.endswith((".inputs", ".rank"))}
    return found


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    making = path.with_suffix(".making")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, making)
    making.replace(path)


def allocate_ranks(recipe: Recipe, structure: Structure, folder: Path) -> list[GroupPlan]:
    """Choose every group's rank from the energies in the factor files."""
    compress = recipe.compress
    groups = chosen_groups(recipe, structure)
    energies: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for block in sorted({group.block for group in groups}):
        tensors = load_file(factors_file(folder, block))
        energies |= {k[:-9]: v for k, v in tensors.items() if k.endswith(".energies")}
        errors |= {k[:-7]: v for k, v in tensors.items() if k.endswith(".errors")}
    candidates = [
        dataclasses.replace(candidate(group), energies=energies[group.leader].numpy())
        for group in groups
    ]
    strategy = STRATEGIES[compress.allocate]
    chosen = strategy(candidates, compress.budget.param_ratio, compress.rank_multiple)
    return [
        _plan(group, chosen[group.leader], energies[group.leader], errors[group.leader])
        for group in groups
    ]


def candidate(group: InputGroup) -> Candidate:
    """The group as an allocation strategy sees it, without energies."""
    rows = sum(member.out_features for member in group.members)
    return Candidate(group.leader, rows, group.members[0].in_features)


def _plan(group: InputGroup, choice: Allocation, energies: Tensor, errors: Tensor) -> GroupPlan:
    if choice.rank is None:
        return GroupPlan(group, choice, 0.0, 0.0)
    predicted = float(energies[choice.rank :].sum())
    return GroupPlan(group, choice, predicted, float(errors[choice.rank - 1]))


def plan_rows(plan: list[GroupPlan]) -> list[PlanRow]:
    """One row a linear; a shared A is counted with its leader."""
    rows = []
    for entry in plan:
        for member in entry.group.members:
            rank = entry.allocation.rank
            leads = member.name == entry.group.leader
            params = member.params
            if rank is not None:
                params = rank * (member.out_features + (member.in_features if leads else 0))
            rows.append(
                PlanRow(
                    name=member.name,
                    shape=(member.out_features, member.in_features),
                    params_dense=member.params,
                    params=params,
                    rank=rank,
                    layer=entry.group.block,
                    group=entry.group.leader if rank is not None else None,
                    reason=entry.allocation.reason,
                    predicted_error=entry.predicted_error,
                    relative_error=entry.relative_error,
                )
            )
    return rows


def low_rank_of(plan: list[GroupPlan]) -> dict[str, PairSpec]:
    """The checkpoint's description of the pairs that a plan makes."""
    return {
        member.name: PairSpec(entry.allocation.rank, entry.group.leader)
        for entry in plan
        if entry.allocation.rank is not None
        for member in entry.group.members
    }


def pair_tensors(plan: list[GroupPlan], folder: Path) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's factor tensors, block by block (float32)."""
    for block in sorted({entry.group.block for entry in plan}):
        tensors = load_file(factors_file(folder, block))
        made: dict[str, Tensor] = {}
        for entry in plan:
            rank = entry.allocation.rank
            if entry.group.block != block or rank is None:
                continue
            leader = entry.group.leader
            made[f"{leader}.lr_a.weight"] = tensors[f"{leader}.a"][:rank].contiguous()
            sizes = [member.out_features for member in entry.group.members]
            parts = split_outputs(tensors[f"{leader}.b"][:, :rank], sizes)
            for member, part in zip(entry.group.members, parts, strict=True):
                made[f"{member.name}.lr_b.weight"] = part.contiguous()
        yield made


def strategy(plan: list[GroupPlan]) -> Iterator[str]:
    """The plan for people: a line a block, with rank and relative output error of each group."""
    for block in sorted({entry.group.block for entry in plan}):
        parts = []
        for entry in plan:
            if entry.group.block != block:
                continue
            names = "+".join(m.name.rpartition(".")[2] for m in entry.group.members)
            rank = entry.allocation.rank
            parts.append(
                f"{names} dense" if rank is None else f"{names} {rank} ({entry.relative_error:.2f})"
            )
        yield f"block {block}: " + ", ".join(parts)
    rows = plan_rows(plan)
    kept = sum(row.params for row in rows) / sum(row.params_dense for row in rows)
    pairs = sum(row.rank is not None for row in rows)
    yield (
        f"rank (relative output error): {pairs} linears became pairs, {len(rows) - pairs} stay "
        f"dense; {kept:.1%} of the parameters kept, {1 - kept:.1%} removed"
    )


def save_plan(plan: list[GroupPlan], path: Path) -> None:
    """The plan as JSON, for the stages that follow and for people."""
    write_atomic(path, json.dumps([dataclasses.asdict(row) for row in plan_rows(plan)], indent=1))
