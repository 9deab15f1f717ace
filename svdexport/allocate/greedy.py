"""One global pass: the predicted loss per parameter decides ranks, and which linears stay dense."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from svdexport.allocate.base import BREAK_EVEN, DENSE_PAYS, Allocation, Candidate
from svdexport.errors import RecipeError
from svdexport.recipe.settings import NO_SETTINGS, Settings

_Option = tuple[int, float, int | None]  # parameters, predicted loss, rank (None: dense)


def allocate(
    candidates: Sequence[Candidate],
    param_ratio: float,
    multiple: int,
    settings: Settings = NO_SETTINGS,
) -> dict[str, Allocation]:
    """Minimise the summed predicted loss within ``param_ratio`` of the dense parameters.

    Every group's options (its ranks, and dense at no loss) are reduced to their lower convex hull
    of loss over parameters; the hulls' segments are bought by their slope, the steepest first
    (the Lagrangian optimum up to one segment), and what is left of the budget is spent on the
    single steps that still fit.

    Raises:
        RecipeError: even the smallest ranks exceed the budget.
    """
    budget = int(param_ratio * sum(item.dense_params for item in candidates))
    options = {item.name: _options(item, multiple) for item in candidates}
    level = dict.fromkeys(options, 0)
    spent = sum(choices[0][0] for choices in options.values())
    if spent > budget:
        raise RecipeError(
            f"compress.budget: param_ratio {param_ratio} is too small: the smallest ranks "
            f"(multiple {multiple}) already keep {spent / _dense(candidates):.3f}"
        )
    segments = [
        (slope, name, end)
        for name, choices in options.items()
        for slope, end in _hull_segments(choices)
    ]
    for _, name, end in sorted(segments, key=lambda s: (-s[0], s[1], s[2])):
        extra = options[name][end][0] - options[name][level[name]][0]
        if end > level[name] and spent + extra <= budget:
            spent, level[name] = spent + extra, end
    _spend_rest(options, level, budget - spent)
    return {item.name: _allocation(options[item.name], level[item.name]) for item in candidates}


def _dense(candidates: Sequence[Candidate]) -> int:
    return sum(item.dense_params for item in candidates)


def _options(item: Candidate, multiple: int) -> list[_Option]:
    """Ranks in ascending order, then dense; parameters ascend and the loss descends."""
    if item.energies is None:
        raise ValueError(f"{item.name}: greedy allocation needs the group's energies")
    tail = np.concatenate([np.cumsum(item.energies[::-1])[::-1], [0.0]])
    pairs: list[_Option] = [
        (item.cost(rank), float(tail[min(rank, len(tail) - 1)]), rank)
        for rank in item.ranks(multiple)
    ]
    return [*pairs, (item.cost(None), 0.0, None)]


def _hull_segments(options: list[_Option]) -> list[tuple[float, int]]:
    """(loss saved per parameter, index of the segment's end), slopes descending."""
    hull: list[int] = []
    for i, (cost, loss, _) in enumerate(options):
        while len(hull) >= 2 and _slope(options, hull[-2], hull[-1]) <= _slope_to(
            options[hull[-1]], cost, loss
        ):
            hull.pop()
        hull.append(i)
    return [(_slope(options, a, b), b) for a, b in itertools.pairwise(hull)]


def _slope(options: list[_Option], a: int, b: int) -> float:
    return _slope_to(options[a], options[b][0], options[b][1])


def _slope_to(start: _Option, cost: int, loss: float) -> float:
    return (start[1] - loss) / (cost - start[0])


def _spend_rest(options: dict[str, list[_Option]], level: dict[str, int], rest: int) -> None:
    """Best single steps that fit into what is left, until none does."""
    while True:
        best: tuple[float, str] | None = None
        for name, choices in options.items():
            if level[name] + 1 >= len(choices):
                continue
            here, there = choices[level[name]], choices[level[name] + 1]
            if there[0] - here[0] <= rest:
                slope = _slope_to(here, there[0], there[1])
                best = max(best, (slope, name)) if best else (slope, name)
        if best is None or best[0] <= 0.0:
            return
        name = best[1]
        rest -= options[name][level[name] + 1][0] - options[name][level[name]][0]
        level[name] += 1


def _allocation(options: list[_Option], level: int) -> Allocation:
    rank = options[level][2]
    if rank is not None:
        return Allocation(rank)
    return Allocation(None, BREAK_EVEN if len(options) == 1 else DENSE_PAYS)
