"""From nested factors to a compressed checkpoint: ranks, plan, pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from svdexport.allocate import STRATEGIES, Allocation, Candidate
from svdexport.checkpoint import EmbeddingSpec, PairSpec
from svdexport.core.gauge import mixed, mixed_squares
from svdexport.core.lowrank import FactorPair
from svdexport.factorize import METHODS, split_outputs
from svdexport.files import write_atomic
from svdexport.models.blocks import InputGroup, Structure
from svdexport.pipeline import speed_budget
from svdexport.pipeline.factor_files import factors_file, pair_at, read_factors
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.speed_budget import SpeedModel
from svdexport.recipe import Compress, Recipe
from svdexport.report.result import PlanRow

NOTHING_ASKED = Allocation(None, "compress.method is none")


@dataclass(frozen=True)
class GroupPlan:
    """A group of linears with its rank (None: dense, with the reason) and predicted errors.

    ``remapped``: its pair is stored, and counted, in Dobi-SVD's slots.
    """

    group: InputGroup
    allocation: Allocation
    predicted_error: float | None
    relative_error: float | None
    remapped: bool = False


def allocate_ranks(
    recipe: Recipe,
    structure: Structure,
    folder: Path,
    more: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    speed: SpeedModel | None = None,
) -> list[GroupPlan]:
    """Choose every group's rank from the energies in the factor files.

    ``more``: by leader, what the strategy had measured on the model (``pipeline.trials``).
    ``speed``: for a budget that is a speedup.
    """
    compress = recipe.compress
    groups = chosen_groups(recipe, structure)
    found: dict[str, Tensor] = {}
    for block in sorted({group.block for group in groups}):
        wanted = (".energies", ".errors", ".similarity")
        found |= read_factors(factors_file(folder, block), wanted)
    candidates = []
    for group in groups:
        similarity = found.get(f"{group.leader}.similarity")
        candidates.append(
            dataclasses.replace(
                candidate(group, recipe.remapped),
                kind=_place(group, structure),
                energies=found[f"{group.leader}.energies"].numpy(),
                similarity=None if similarity is None else float(similarity),
                **more.get(group.leader, {}),
            )
        )
    stack = {group.leader: group.stack or group.leader for group in groups}
    stacked = one_rank_a_stack(candidates, stack)

    def allocate(ratio: float) -> dict[str, Allocation]:
        strategy = STRATEGIES[compress.allocate].allocate
        return strategy(stacked, ratio, compress.rank_multiple, compress.allocation)

    if speed is not None and compress.budget is not None and compress.budget.speedup is not None:
        merged = speed_budget.choose(speed, compress.budget.speedup, allocate)
    else:
        merged = allocate(compress.kept)
    chosen = {leader: merged[name] for leader, name in stack.items()}
    return [
        _plan(
            group,
            chosen[group.leader],
            found[f"{group.leader}.energies"],
            found[f"{group.leader}.errors"],
            recipe.remapped,
        )
        for group in groups
    ]


def one_rank_a_stack(candidates: Sequence[Candidate], stack: Mapping[str, str]) -> list[Candidate]:
    """The candidates with those of one stack, by their names, in one."""
    together: dict[str, list[Candidate]] = {}
    for item in candidates:
        together.setdefault(stack[item.name], []).append(item)
    return [
        items[0] if len(items) == 1 and name == items[0].name else _merged(name, items)
        for name, items in together.items()
    ]


def _merged(name: str, items: Sequence[Candidate]) -> Candidate:
    """Truncated together: energies add up; of what was measured one by one, the worst counts."""
    energies = [item.energies for item in items if item.energies is not None]
    positions = [item.position for item in items if item.position is not None]
    trials = [item.trials for item in items if item.trials is not None]
    return dataclasses.replace(
        items[0],
        name=name,
        count=len(items),
        energies=np.sum(energies, axis=0) if energies else None,
        position=max(positions, default=None),
        trials=tuple(max(alike, key=lambda t: t[1]) for alike in zip(*trials, strict=True))
        if trials
        else None,
    )


def all_dense(recipe: Recipe, structure: Structure) -> list[GroupPlan]:
    """The plan of ``compress.method: none``."""
    groups = chosen_groups(recipe, structure)
    return [GroupPlan(group, NOTHING_ASKED, 0.0, 0.0) for group in groups]


def candidate(group: InputGroup, remapped: bool = False) -> Candidate:
    """The group as an allocation strategy sees it, without energies."""
    rows = sum(member.out_features for member in group.members)
    columns = group.members[0].in_features
    return Candidate(group.leader, rows, columns, block=group.block, remapped=remapped)


def _place(group: InputGroup, structure: Structure) -> str:
    """Its linears' paths within the block, the same in every block; one for all experts."""
    block = structure.blocks[group.block] + "."
    return "+".join((member.stack or member.name).removeprefix(block) for member in group.members)


def _plan(
    group: InputGroup, choice: Allocation, energies: Tensor, errors: Tensor, remapped: bool
) -> GroupPlan:
    if choice.rank is None:
        return GroupPlan(group, choice, 0.0, 0.0)
    predicted = float(energies[choice.rank :].sum())
    return GroupPlan(group, choice, predicted, float(errors[choice.rank - 1]), remapped)


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
                if entry.remapped:  # all of a group's slots are with its leader
                    item = candidate(entry.group, remapped=True)
                    params = item.cost(rank) if leads else 0
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


def embedding_of(plan: list[GroupPlan], structure: Structure) -> EmbeddingSpec | None:
    """The low-rank token embedding that a plan makes, if it does."""
    for entry in plan:
        if entry.group.members[0] == structure.embedding and entry.allocation.rank is not None:
            name, rank = entry.group.leader, entry.allocation.rank
            return EmbeddingSpec(name, rank, structure.tied_head)
    return None


def low_rank_of(plan: list[GroupPlan], structure: Structure) -> dict[str, PairSpec]:
    """The checkpoint's description of the pairs that a plan makes of linears."""
    return {
        member.name: PairSpec(entry.allocation.rank, entry.group.leader)
        for entry in plan
        if entry.allocation.rank is not None and entry.group.members[0] != structure.embedding
        for member in entry.group.members
    }


def pair_tensors(
    compress: Compress, plan: list[GroupPlan], folder: Path
) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's factor tensors, block by block (float32)."""
    for block in sorted({entry.group.block for entry in plan}):
        tensors = load_file(factors_file(folder, block))
        made: dict[str, Tensor] = {}
        for entry in plan:
            rank = entry.allocation.rank
            if entry.group.block != block or rank is None:
                continue
            leader = entry.group.leader
            pair = pair_at(compress, tensors, leader, rank)
            if not METHODS[compress.method].embedding:  # which is a table of rows, not a product
                pair = FactorPair(*mixed(pair.a, pair.b))
            made[f"{leader}.lr_a.weight"] = pair.a
            sizes = [member.out_features for member in entry.group.members]
            for member, part in zip(entry.group.members, split_outputs(pair.b, sizes), strict=True):
                made[f"{member.name}.lr_b.weight"] = part.contiguous()
        yield made


def mixed_importance(plan: list[GroupPlan], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The quantisers' weights with those of A x as they are in the pairs that were made."""
    ranks = {f"{e.group.leader}.rank": e.allocation.rank for e in plan}
    return {
        name: mixed_squares(values[:rank]) if (rank := ranks.get(name)) else values
        for name, values in found.items()
    }


def strategy(plan: list[GroupPlan]) -> Iterator[str]:
    """The plan for people: a line a block, with rank and relative output error of each group."""
    for block in sorted({entry.group.block for entry in plan}):
        parts: dict[str, list[GroupPlan]] = {}
        for entry in plan:
            if entry.group.block == block:
                parts.setdefault(entry.group.stack or entry.group.leader, []).append(entry)
        yield f"block {block}: " + ", ".join(map(_line, parts.values()))
    rows = plan_rows(plan)
    kept = sum(row.params for row in rows) / sum(row.params_dense for row in rows)
    pairs = sum(row.rank is not None for row in rows)
    yield (
        f"rank (relative output error): {pairs} linears became pairs, {len(rows) - pairs} stay "
        f"dense; {kept:.1%} of the parameters kept, {1 - kept:.1%} removed"
    )


def _line(alike: list[GroupPlan]) -> str:
    """A group, or all experts' pairs of one stack."""
    first = alike[0]
    names = "+".join(m.name.rpartition(".")[2] for m in first.group.members)
    if first.group.stack is not None:
        names = f"{len(alike)} experts' {names}"
    if first.allocation.rank is None:
        return f"{names} dense"
    errors = sorted(f"{entry.relative_error:.2f}" for entry in alike)
    span = errors[0] if errors[0] == errors[-1] else f"{errors[0]} to {errors[-1]}"
    return f"{names} {first.allocation.rank} ({span})"


def save_plan(plan: list[GroupPlan], path: Path) -> None:
    """The plan as JSON, for the stages that follow and for people."""
    write_atomic(path, json.dumps([dataclasses.asdict(row) for row in plan_rows(plan)], indent=1))
