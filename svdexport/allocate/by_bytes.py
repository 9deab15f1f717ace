"""A budget in bytes over options of any kind: each part of a model picks one.

The options of a part are reduced to their lower convex hull of loss over bytes; the hulls'
segments are bought by their slope, the steepest first (the Lagrangian optimum up to one segment),
and what is left is spent on the best single changes that still fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdexport.errors import RecipeError


@dataclass(frozen=True)
class Option:
    """One way to store a part.

    Attributes:
        bytes: in the exported file. loss: predicted, comparable across parts.
        rank: of a pair; None is dense. types: ggml types: of A and B, of the dense matrix, or of
            all three where a pair stands beside a quantised matrix (residual form).
    """

    bytes: int
    loss: float
    rank: int | None
    types: tuple[str, ...]

    @property
    def residual(self) -> bool:
        """Whether a pair holds what quantising the dense matrix loses."""
        return len(self.types) == 3


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Small summed loss within ``budget`` bytes.

    Raises:
        RecipeError: even the smallest option of every part exceeds the budget.
    """
    hulls = {name: _hull(found) for name, found in options.items()}
    level = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].bytes for hull in hulls.values())
    if spent > budget:
        raise RecipeError(
            f"compress.budget.bytes: {spent - budget:,} bytes too few: the smallest choice of "
            "every tensor already needs more"
        )
    segments = sorted(
        (-_slope(one, two), name, index + 1)
        for name, hull in hulls.items()
        for index, (one, two) in enumerate(itertools.pairwise(hull))
    )
    for _, name, end in segments:
        extra = hulls[name][end].bytes - hulls[name][level[name]].bytes
        if end > level[name] and spent + extra <= budget:
            spent, level[name] = spent + extra, end
    chosen = {name: hull[level[name]] for name, hull in hulls.items()}
    return _spend_rest(options, chosen, budget - spent)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of loss over bytes, bytes ascending, loss strictly falling."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, two: Option) -> float:
    """Loss saved per byte."""
    return (one.loss - two.loss) / (two.bytes - one.bytes)


def _spend_rest(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], rest: int
) -> dict[str, Option]:
    """The change of one part that saves most and fits, until none does."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, found in options.items():
            here = chosen[name]
            for option in found:
                saved = here.loss - option.loss
                fits = option.bytes - here.bytes <= rest
                if fits and saved > 0 and (best is None or saved > best[0]):
                    best = (saved, name, option)
        if best is None:
            return chosen
        _, name, option = best
        rest -= option.bytes - chosen[name].bytes
        chosen = {**chosen, name: option}
