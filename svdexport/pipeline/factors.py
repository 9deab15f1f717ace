"""The factors stage: statistics of one block after another in, nested factors of it out."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from svdexport.allocate import STRATEGIES
from svdexport.core.decompose import Decomposition, Fit, fit, fit_of_optimum
from svdexport.core.gauge import with_even_scales
from svdexport.core.lowrank import break_even_rank
from svdexport.core.moments import Statistic, mean_shape
from svdexport.core.noise import noise_model, share_left
from svdexport.core.ranks import ALONE, Ranks
from svdexport.errors import InputError, RecipeError
from svdexport.factorize import METHODS, GroupData
from svdexport.models.blocks import InputGroup, Structure, matches, select
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.weights import Weights, as_weights
from svdexport.pipeline.factor_files import factors_file, save_factors
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Recipe
from svdexport.recipe.settings import BasisSharing, DobiSvd, KfacSvd


def chosen_groups(recipe: Recipe, structure: Structure) -> list[InputGroup]:
    """Groups of linears that the recipe compresses."""
    compress = recipe.compress
    if recipe.quantize and recipe.quantize.sequential:  # it takes all linears
        _check_experts(structure.groups, "quantize.sequential", "leave it out")
    method = METHODS.get(compress.method)  # none: all linears that a method could take
    if method is not None and method.embedding:
        if structure.embedding is None:
            raise InputError(
                f"compress.method: {compress.method} factorises the token embedding, but this "
                "model's is not a plain table"
            )
        return [InputGroup(0, (structure.embedding,))]
    only = method.only if method else ()
    if only:
        return select(structure, compress.targets, compress.ignore, False, only)
    chosen = select(structure, compress.targets, compress.ignore, compress.group)
    without = r"leave it out, or add 're:\.experts\.' to compress.ignore"
    if compress.sequential:
        _check_experts(chosen, "compress.sequential", without)
    if any(entry.method == "sequential_ls" for entry in recipe.refine):
        _check_experts(chosen, "refine sequential_ls", without)
    return chosen


def _check_experts(groups: Iterable[InputGroup], what: str, way_out: str) -> None:
    """What walks the model and its compressed self side by side needs the same tokens in both."""
    if any(group.stack for group in groups):
        raise RecipeError(
            f"{what}: cannot be used on the experts of a mixture, to which the compressed model "
            f"may send other tokens; {way_out}"
        )


def statistics(recipe: Recipe) -> frozenset[Statistic]:
    """What calibration must collect for the recipe's method and allocation."""
    compress = recipe.compress
    if compress.method == "none":  # quantisation takes its own
        return frozenset()
    needs = METHODS[compress.method].needs | STRATEGIES[compress.allocate].needs
    return needs | {"sampled_gradients"} if both_labels(recipe) else needs


def both_labels(recipe: Recipe) -> bool:
    """Whether G is the mean of those of the text's tokens and of tokens that the model draws."""
    settings = recipe.compress.settings
    return isinstance(settings, KfacSvd) and settings.labels == "both"


def finished_blocks(recipe: Recipe, structure: Structure, folder: Path) -> list[int]:
    """Blocks whose factors are in the folder; of those factorised together all or none."""
    span, count = span_of(recipe), len(structure.blocks)
    done = [factors_file(folder, block).exists() for block in range(count)]
    return [b for b in range(count) if all(done[b // span * span : b // span * span + span])]


def span_of(recipe: Recipe) -> int:
    """Adjacent blocks that the method factorises together."""
    settings = recipe.compress.settings
    return settings.layers if isinstance(settings, BasisSharing) else 1


def factorize_blocks(
    recipe: Recipe,
    structure: Structure,
    model: nn.Module | Weights,
    tokens: Tensor,
    folder: Path,
    reporter: Reporter,
    finished: Collection[int] = (),
    ranks: Ranks = ALONE,
) -> None:
    """Decompose every chosen group, block by block; one file of nested factors per block.

    Args:
        finished: blocks that are not worked on again.
        ranks: processes that share samples and groups; rank 0 writes the files.
    """
    weights = as_weights(model)
    worker = Factorizer(recipe, structure, weights, folder, ranks)
    scratch = folder.with_name(f"activations-{ranks.rank}")
    scratch.mkdir(parents=True, exist_ok=True)
    found = moments_for([recipe], structure, weights, tokens, scratch, reporter, finished, ranks)
    for moments in found:
        worker.take(moments)
        del moments  # not kept while the next block's are collected
    shutil.rmtree(scratch)


class Factorizer:
    """Turns the statistics of blocks, as they come, into files of nested factors.

    A method that works across adjacent blocks gets them together, once all of them have come.
    """

    def __init__(
        self,
        recipe: Recipe,
        structure: Structure,
        model: nn.Module | Weights,
        folder: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.weights, self.folder = recipe, as_weights(model), folder
        self.ranks = ranks
        self.groups = chosen_groups(recipe, structure)
        self.blocks = len(structure.blocks)
        self._waiting: dict[int, list[BlockMoments]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, moments: BlockMoments) -> None:
        """Factorise a block, or keep it until those that it shares with have come."""
        span = span_of(self.recipe)
        first = moments.block // span * span
        together = self._waiting.setdefault(first, [])
        together.append(moments)
        if len(together) == min(span, self.blocks - first):
            self._factorize(sorted(self._waiting.pop(first), key=lambda m: m.block))

    def _factorize(self, blocks: list[BlockMoments]) -> None:
        tensors: list[dict[str, Tensor]] = [{} for _ in blocks]
        per_block = [[g for g in self.groups if g.block == m.block] for m in blocks]
        for alike in shares(list(self._shared(per_block)), self.ranks.size)[self.ranks.rank]:
            data = [_group_data(self.recipe, self.weights, group, blocks[i]) for i, group in alike]
            for (i, group), given, found in zip(alike, data, self._decompose(data), strict=True):
                tensors[i] |= self._tensors(group, given, found, blocks[i])
        for moments, made in zip(blocks, tensors, strict=True):
            gathered = self.ranks.gather(made)
            if self.ranks.rank == 0:
                save_factors(gathered, factors_file(self.folder, moments.block))

    def _shared(self, blocks: list[list[InputGroup]]) -> Iterator[list[tuple[int, InputGroup]]]:
        """Groups that are factorised together, each with the number of its block in the list."""
        settings = self.recipe.compress.settings
        apart = settings.apart if isinstance(settings, BasisSharing) else ()
        kinds: dict[tuple[object, ...], list[tuple[int, InputGroup]]] = {}
        for i, groups in enumerate(blocks):
            for group in groups:
                shape = tuple((m.out_features, m.in_features) for m in group.members)
                alone = i if any(matches(m.name, apart) for m in group.members) else None
                kinds.setdefault((_place(group), shape, alone), []).append((i, group))
        yield from kinds.values()

    def _decompose(self, data: Sequence[GroupData]) -> list[Decomposition]:
        method = METHODS[self.recipe.compress.method]
        if method.factorize_across is not None:
            return method.factorize_across(data)
        return [method.factorize(one) for one in data]

    def _tensors(
        self, group: InputGroup, data: GroupData, found: Decomposition, moments: BlockMoments
    ) -> dict[str, Tensor]:
        method = METHODS[self.recipe.compress.method]
        good = fit_of_optimum(found) if method.optimal else fit(data.weights, found, data.inputs)
        if method.factorize_across is None:  # else: one basis for all
            found, squares = with_even_scales(found, good.squares)
            good = Fit(good.errors, squares)
        tensors = _pack(group.leader, found, good.errors) | _importance(group, good, moments)
        if group.leader in moments.few:
            tensors[f"{group.leader}.few"] = torch.tensor(moments.few[group.leader])
        if moments.similarity is not None:
            tensors[f"{group.leader}.similarity"] = torch.tensor(moments.similarity).double()
        if self.recipe.compress.by_bytes:
            tensors |= _noise(self.recipe, group.leader, found, data)
        if method.keep is not None:
            tensors |= {f"{group.leader}.keep.{name}": t for name, t in method.keep(data).items()}
        if self.recipe.compress.sequential:
            for member, gradient in zip(group.members, data.gradients or (), strict=False):
                tensors[f"{member.name}.gradient"] = gradient.float()
        return tensors


Alike = list[tuple[int, InputGroup]]


def shares(work: list[Alike], count: int) -> list[list[Alike]]:
    """The groups by process: the costliest first, each to the one with the least to do."""

    def cost(alike: Alike) -> int:
        rows = sum(m.out_features for _, group in alike for m in group.members)
        columns = alike[0][1].members[0].in_features
        return rows * columns * min(rows, columns)

    parts: list[list[Alike]] = [[] for _ in range(count)]
    for alike in sorted(work, key=cost, reverse=True):
        min(parts, key=lambda part: sum(map(cost, part))).append(alike)
    return parts


def kind(group: InputGroup) -> str:
    """What the group is called in every block: ``q_proj+k_proj+v_proj``."""
    return "+".join(member.name.rpartition(".")[2] for member in group.members)


def _place(group: InputGroup) -> str:
    """The same, and for a linear of an expert which expert: unlike ones share nothing."""
    if group.stack is None:
        return kind(group)
    return ".".join(group.leader.rsplit(".", 2)[1:])


def moments_for(
    recipes: Sequence[Recipe],
    structure: Structure,
    weights: Weights,
    tokens: Tensor,
    scratch: Path,
    reporter: Reporter,
    skip: Collection[int] = (),
    ranks: Ranks = ALONE,
) -> Iterator[BlockMoments]:
    """Statistics that serve all the recipes, which share their calibration."""
    needs = frozenset[Statistic]().union(*(statistics(recipe) for recipe in recipes))
    if not needs:
        for index in range(len(structure.blocks)):
            if index not in skip:
                yield BlockMoments(index, {}, {})
            reporter.progress("factorize", index + 1, len(structure.blocks))
        return
    settings = [recipe.compress.settings for recipe in recipes]
    yield from calibrate(
        weights,
        structure,
        tokens,
        batch=recipes[0].calibration.batch,
        precision=recipes[0].calibration.precision,
        statistics=needs,
        scratch=scratch,
        keep_rows=max((s.rows for s in settings if isinstance(s, DobiSvd)), default=0),
        skip=skip,
        ranks=ranks,
        seed=recipes[0].calibration.seed,
        progress=reporter.progress,
    )


def _group_data(
    recipe: Recipe, model: Weights, group: InputGroup, moments: BlockMoments
) -> GroupData:
    names = [member.name for member in group.members]
    weights = tuple(model.linear(name) for name in names)
    rows = sum(member.out_features for member in group.members)
    inputs = moments.inputs[names[0]].matrix if names[0] in moments.inputs else None
    gradients = None
    if moments.gradients:
        gradients = tuple(output_moment(recipe, moments, name) for name in names)
    fisher = tuple(moments.fisher[name] for name in names) if moments.fisher else None
    columns = group.members[0].in_features
    # in bytes, or remapped, a pair may be smaller than the dense matrix at any rank
    by_params = not (recipe.compress.by_bytes or recipe.remapped)
    limit = max(1, break_even_rank(rows, columns)) if by_params else min(rows, columns)
    return GroupData(
        weights,
        inputs,
        gradients,
        limit,
        recipe.compress.damping,
        recipe.compress.settings,
        moments.mean_abs.get(names[0]),
        fisher,
        moments.rows.get(names[0]),
    )


def output_moment(recipe: Recipe, moments: BlockMoments, name: str) -> Tensor:
    """G of one linear, (m, m), as the recipe's method wants it."""
    own = moments.gradients[name].matrix
    return mean_shape(own, moments.sampled_gradients[name].matrix) if both_labels(recipe) else own


def _pack(leader: str, found: Decomposition, errors: Tensor) -> dict[str, Tensor]:
    return {
        f"{leader}.a": found.a,
        f"{leader}.b": found.b,
        f"{leader}.energies": found.energies,
        f"{leader}.errors": errors,
        f"{leader}.damping": torch.tensor(found.damping, dtype=torch.float64),
    }


def _noise(
    recipe: Recipe, leader: str, decomposed: Decomposition, data: GroupData
) -> dict[str, Tensor]:
    """What a byte budget needs to predict the losses of quantised forms."""
    assert data.inputs is not None and data.gradients is not None and recipe.quantize
    model = noise_model(
        data.weights,
        decomposed,
        data.inputs,
        data.gradients,
        damping=recipe.quantize.damping,
        output_damping=recipe.compress.damping,
    )
    dense = torch.tensor(model.dense, dtype=torch.float64)
    found = {"dense": dense, "a": model.a, "b": model.b}
    budget = recipe.compress.budget
    if budget is not None and "residual" in budget.forms:
        found["left"] = share_left(torch.cat(data.weights), data.inputs, recipe.quantize.damping)
    return {f"{leader}.noise.{name}": values for name, values in found.items()}


def _importance(group: InputGroup, found: Fit, moments: BlockMoments) -> dict[str, Tensor]:
    """Mean squares of the input channels (n_in,) and of A x (k,), for quantisers; or nothing."""
    moment = moments.inputs.get(group.leader)
    if moment is None:
        return {}
    h, rows = moment.matrix, max(1, moment.rows)  # not divided as a whole: it may be a gigabyte
    inputs = (h.diagonal() / rows).float().contiguous()
    return {f"{m.name}.inputs": inputs.clone() for m in group.members} | {
        f"{group.leader}.rank": (found.squares / rows).float()
    }
