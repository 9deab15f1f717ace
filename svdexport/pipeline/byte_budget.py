"""``budget: {bytes: ...}``: form, rank and type of every matrix, so that the GGUF fits.

Options of a group of linears: dense at each type, a pair of each rank with each type for A and for
B, or both: a quantised matrix and a pair of small rank for what that loses. Losses are predicted
from the moments (:mod:`svdexport.core.noise`); that of the embedding and the head is measured once
(:mod:`svdexport.pipeline.vocabulary`) and scaled by the types' noise. Bytes are those of the
exported file, alignment and headers included.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from svdexport.allocate import Allocation
from svdexport.allocate.base import DENSE_PAYS
from svdexport.allocate.by_bytes import Option, choose
from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.noise import relative_noise
from svdexport.errors import RecipeError
from svdexport.export import gguf_base
from svdexport.export.gguf_layout import a_stems
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_plan import find_matches
from svdexport.export.gguf_types import Types, held
from svdexport.files import write_atomic
from svdexport.models.blocks import InputGroup
from svdexport.pipeline.compress import GroupPlan
from svdexport.pipeline.factor_files import factors_file
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.job import Job, ModelUnderWork
from svdexport.pipeline.vocabulary import losses, vocabulary
from svdexport.recipe import GgufExport
from svdexport.runtimes.gguf_file import BLOCKS, GgufFile, nbytes

TYPES_FILE = "types.json"  # checkpoint tensor -> ggml type
LADDER = tuple(sorted(GRIDS, key=lambda name: BLOCKS[name][1] / BLOCKS[name][0]))
RESIDUAL_FILE = "residual.json"  # leader -> linears in residual form and the rank of their pair
RESIDUAL_RANKS = (32, 64, 128, 256)
RESIDUAL_TYPES = ("Q8_0", "Q4_0")
BESIDE = "dense, with a pair for what its type loses"
ENTRY_BYTES = 160  # more than a tensor's entry in the header takes
OWN_METADATA_BYTES = 512
EXPERTS = "a budget in bytes leaves the experts of a mixture dense"


def allocate_bytes(
    job: Job, model: ModelUnderWork, factors: Path, tokens: Tensor
) -> list[GroupPlan]:
    """The plan, and ``types.json`` and ``residual.json`` in the work folder.

    Raises RecipeError where the smallest choice of every tensor is too large.
    """
    recipe = job.recipe
    every = chosen_groups(recipe, model.structure)
    groups = [group for group in every if group.stack is None]
    matrices = vocabulary(model.model)
    budget = recipe.compress.budget
    assert budget is not None and budget.bytes is not None and recipe.quantize is not None
    ladder = [name for name in LADDER if budget.types is None or name in budget.types]
    work = job.work / "base"
    base = gguf_base.prepare(model.source.folder, model.source.gguf, work)
    matches = find_matches(base, Checkpoint.open(model.source.folder), work)
    options: dict[str, list[Option]] = {}
    data: dict[str, dict[str, Tensor]] = {}
    for block in sorted({group.block for group in groups}):
        tensors = load_file(factors_file(factors, block))
        for group in groups:
            if group.block == block:
                found = _of(tensors, group.leader)
                data[group.leader] = {k: found[k] for k in ("energies", "errors")}
                multiple = recipe.compress.rank_multiple
                options[group.leader] = [
                    option
                    for form, made in _group_options(
                        group, found, multiple, ladder, _copies(group, matches)
                    )
                    if form in budget.forms
                    for option in made
                ]
    probes = losses(model.model, matrices, tokens, recipe.quantize)
    for name, loss in probes.items():
        options[name] = _matrix_options(*matrices[name], loss, ladder)
    if stuck := [name for name, found in options.items() if not found]:
        raise RecipeError(
            f"compress.budget.types: {', '.join(ladder)}: the rows of {stuck[0]} fill no block of "
            "any of them; add one with blocks of 32 (Q8_0, Q5_1, Q5_0, IQ4_NL, Q4_0)"
        )
    fixed = _fixed_bytes(base.file, matches, groups, list(matrices))
    chosen = choose(options, budget.bytes - fixed)
    types = {f"{name}.weight": chosen[name].types[0] for name in probes}
    for group in groups:
        types |= _types_of(group, chosen[group.leader])
    beside = {
        group.leader: {
            "linears": [member.name for member in group.members],
            "rank": chosen[group.leader].rank,
        }
        for group in groups
        if chosen[group.leader].residual
    }
    write_atomic(job.work / TYPES_FILE, json.dumps(types, indent=1, sort_keys=True))
    write_atomic(job.work / RESIDUAL_FILE, json.dumps(beside, indent=1, sort_keys=True))
    for line in _summary(chosen, fixed, budget.bytes, tokens.numel()):
        job.reporter.note(line)
    return [
        GroupPlan(group, Allocation(None, EXPERTS), 0.0, 0.0)
        if group.stack is not None
        else _plan(group, chosen[group.leader], data[group.leader])
        for group in every
    ]


def _of(tensors: Mapping[str, Tensor], leader: str) -> dict[str, Tensor]:
    prefix = f"{leader}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stored(type_name: str, row: int, rows: int, alignment: int = 32) -> int:
    """Bytes of a tensor in the file, padding included."""
    size = nbytes(type_name, row * rows)
    return -(-size // alignment) * alignment


def _fitting(row: int, ladder: Sequence[str]) -> list[str]:
    return [name for name in ladder if row % BLOCKS[name][0] == 0]


def _copies(group: InputGroup, matches: Mapping[str, Match]) -> int:
    """How often the file holds the group's A: once for each name that llama.cpp finds it under."""
    found = [matches.get(f"{member.name}.weight") for member in group.members]
    return len(set(a_stems([match.tensor.removesuffix(".weight") for match in found if match])))


def _group_options(
    group: InputGroup,
    found: Mapping[str, Tensor],
    multiple: int,
    ladder: Sequence[str],
    copies: int,
) -> Iterator[tuple[str, Iterator[Option]]]:
    """Options by form. Residual ones as GPTQ leaves the dense error, whose leading directions the
    pair takes; its factors are rounded too."""
    yield "dense", _dense_options(group, found, ladder)
    yield "pair", _pair_options(group, found, multiple, ladder, copies)
    yield "residual", _residual_options(group, found, ladder, copies)


def _dense_options(
    group: InputGroup, found: Mapping[str, Tensor], ladder: Sequence[str]
) -> Iterator[Option]:
    n = group.members[0].in_features
    for name in _fitting(n, ladder):
        size = sum(stored(name, n, member.out_features) for member in group.members)
        yield Option(size, relative_noise(name) * float(found["noise.dense"]), None, (name,))


def _pair_bytes(group: InputGroup, rank: int, a: str, b: str, copies: int) -> int:
    size = ENTRY_BYTES * (copies + len(group.members))
    size += copies * stored(a, group.members[0].in_features, rank)
    return size + sum(stored(b, rank, member.out_features) for member in group.members)


def _pair_options(
    group: InputGroup,
    found: Mapping[str, Tensor],
    multiple: int,
    ladder: Sequence[str],
    copies: int,
) -> Iterator[Option]:
    n = group.members[0].in_features
    of_a, of_b = found["noise.a"], found["noise.b"]
    tail = torch.cat([found["energies"].flip(0).cumsum(0).flip(0), torch.zeros(1)])
    for rank in range(multiple, len(of_a) + 1, multiple):
        for a, b in itertools.product(_fitting(n, ladder), _fitting(rank, ladder)):
            loss = float(tail[rank]) + relative_noise(a) * float(of_a[rank - 1])
            loss += relative_noise(b) * float(of_b[rank - 1])
            yield Option(_pair_bytes(group, rank, a, b, copies), loss, rank, (a, b))


def _residual_options(
    group: InputGroup, found: Mapping[str, Tensor], ladder: Sequence[str], copies: int
) -> Iterator[Option]:
    left = found["noise.left"]
    factors = [name for name in RESIDUAL_TYPES if name in ladder]
    for dense in _dense_options(group, found, ladder):
        for rank, name in itertools.product(RESIDUAL_RANKS, factors):
            if rank < len(left) - 1 and name in _fitting(group.members[0].in_features, ladder):
                share = float(left[rank])
                share += 2 * relative_noise(name) * (1.0 - share)
                size = dense.bytes + _pair_bytes(group, rank, name, name, copies)
                yield Option(size, dense.loss * share, rank, (*dense.types, name, name))


def _matrix_options(rows: int, columns: int, loss: float, ladder: Sequence[str]) -> list[Option]:
    return [
        Option(stored(name, columns, rows), relative_noise(name) * loss, None, (name,))
        for name in _fitting(columns, ladder)
    ]


def _fixed_bytes(
    file: GgufFile,
    matches: Mapping[str, Match],
    groups: list[InputGroup],
    vocabulary: list[str],
) -> int:
    """Metadata, header, and the tensors that the plan does not choose."""
    names = [member.name for group in groups for member in group.members] + vocabulary
    chosen = {matches[f"{name}.weight"].tensor for name in names if f"{name}.weight" in matches}
    types = Types.of(GgufExport(type="mixed"), tied="output.weight" not in file.tensors)
    first = min(info.offset for info in file.tensors.values())
    rest = 0
    for name, info in file.tensors.items():
        if name not in chosen:
            given = held(types.dense(name, info), info.ne[0])
            rows = 1
            for n in info.ne[1:]:
                rows *= n
            rest += stored(given, info.ne[0], rows, file.alignment)
    return first + OWN_METADATA_BYTES + rest


def _types_of(group: InputGroup, option: Option) -> dict[str, str]:
    types = {}
    if option.rank is None or option.residual:
        types = {f"{member.name}.weight": option.types[0] for member in group.members}
    if option.rank is not None:
        a, b = option.types[-2:]
        types[f"{group.leader}.lr_a.weight"] = a
        types |= {f"{member.name}.lr_b.weight": b for member in group.members}
    return types


def _plan(group: InputGroup, option: Option, data: Mapping[str, Tensor]) -> GroupPlan:
    if option.rank is None or option.residual:
        reason = BESIDE if option.residual else DENSE_PAYS
        return GroupPlan(group, Allocation(None, reason), option.loss, 0.0)
    error = float(data["errors"][option.rank - 1])
    return GroupPlan(group, Allocation(option.rank), option.loss, error)


def _summary(chosen: Mapping[str, Option], fixed: int, budget: int, tokens: int) -> Iterator[str]:
    total = fixed + sum(option.bytes for option in chosen.values())
    loss = sum(option.loss for option in chosen.values()) / (2 * tokens**2)
    yield (
        f"byte budget {budget:,}: {total:,} planned, {fixed:,} of them metadata, norms and "
        f"headers; predicted divergence {loss:.3g} a token"
    )
    kinds = Counter(map(_kind, chosen.values()))
    yield "; ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _kind(option: Option) -> str:
    if option.residual:
        return f"residual {option.types[0]} + {' x '.join(option.types[1:])}"
    return ("dense " if option.rank is None else "pair ") + " x ".join(option.types)
