"""Allocations against slow, obvious formulas: every scale, every bound, every multiplier tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svdexport.allocate import STRATEGIES, Allocation, Candidate
from svdexport.allocate.by_bytes import Option, choose
from svdexport.models.blocks import discover, select
from svdexport.models.truncation import learn_positions
from svdexport.recipe.settings import Adacr, AsvdTrials, DobiPositions, LorcDepth, Settings
from tests.unit.test_models import TOKENS, llama

Ranks = dict[str, int | None]


def ranks_of(chosen: Mapping[str, Allocation]) -> Ranks:
    return {name: found.rank for name, found in chosen.items()}


def params(item: Candidate, rank: int | None) -> int:
    m, n = item.out_features, item.in_features
    return m * n if rank is None else rank * (m + n)


def total(items: Sequence[Candidate], ranks: Ranks) -> int:
    return sum(params(item, ranks[item.name]) for item in items)


def made(seed: int, count: int = 5) -> list[Candidate]:
    """Groups of two kinds in blocks of two, with all that a strategy may ask for."""
    random = np.random.default_rng(seed)
    items = []
    for i in range(count):
        m, n = (int(size) for size in random.integers(40, 120, size=2))
        energies = np.sort(random.gamma(0.3, 50.0, size=min(m, n)) + 0.01)[::-1]
        perplexities = 10.0 + np.sort(random.random(4))[::-1] * 10.0 ** random.integers(-1, 2)
        trials = tuple(zip((0.2, 0.4, 0.6, 0.8), map(float, perplexities), strict=True))
        items.append(
            Candidate(
                f"layer{i}", m, n, energies, "qo"[i % 2], i // 2,
                similarity=float(random.uniform(0.2, 1.0)), trials=trials,
                position=float(random.uniform(1.0, min(m, n) / 2)),
            )
        )  # fmt: skip
    return items


def at_scale(
    items: Sequence[Candidate], shares: Mapping[str, float], scale: float, multiple: int
) -> Ranks:
    ranks: Ranks = {}
    for item in items:
        wanted = scale * shares[item.name] * params(item, None) / params(item, 1)
        rank = max(multiple, int(wanted / multiple + 0.5) * multiple)
        ranks[item.name] = rank if params(item, rank) < params(item, None) else None
    return ranks


def check(
    items: Sequence[Candidate],
    shares: Mapping[str, float],
    ratio: float,
    multiple: int,
    found: Ranks,
) -> None:
    """``found`` is what the largest scale of the wanted shares within the budget gives."""
    budget = ratio * sum(params(item, None) for item in items)
    scales = np.linspace(0.0, 1.0 / min(shares.values()), 4001)
    tried = [at_scale(items, shares, scale, multiple) for scale in scales]
    fitting = [ranks for ranks in tried if total(items, ranks) <= budget]
    assert total(items, fitting[-1]) <= total(items, found) <= budget
    following = next((ranks for ranks in tried if total(items, ranks) > budget), None)
    for name, rank in found.items():  # between the last that fits and the first that does not
        low, high = fitting[-1][name], rank if following is None else following[name]
        assert low is None or rank is None or low <= rank
        assert rank is None or high is None or rank <= high


def of_many_sizes(test: Callable[..., None]) -> Callable[..., None]:
    """A test at four sets of linears, each at three ratios and multiples."""
    sized = pytest.mark.parametrize(("ratio", "multiple"), [(0.4, 1), (0.6, 4), (0.8, 8)])(test)
    return pytest.mark.parametrize("seed", range(4))(sized)


@of_many_sizes
def test_adacr(seed: int, ratio: float, multiple: int) -> None:
    items = made(seed)
    values = {item.name: item.similarity or 0.0 for item in items}
    mean = np.mean(list(values.values()))
    shares = {name: 0.3 + value / mean * (ratio - 0.3) for name, value in values.items()}
    found = STRATEGIES["adacr"].allocate(items, ratio, multiple, Adacr(min_ratio=0.3))
    check(items, shares, ratio, multiple, ranks_of(found))


@of_many_sizes
def test_svd_llm_v2(seed: int, ratio: float, multiple: int) -> None:
    items = made(seed)
    shares: dict[str, float] = {}
    for kind in "qo":
        members = [item for item in items if item.kind == kind]
        inverse = {}
        for item in members:
            assert item.energies is not None
            wanted = ratio * params(item, None) / params(item, 1)
            rank = max(multiple, int(wanted / multiple + 0.5) * multiple)
            inverse[item.name] = 1.0 / np.log(np.sqrt(sum(item.energies[rank:])) * 100.0)
        for name, value in inverse.items():
            removed = (1.0 - ratio) * len(members) * value / sum(inverse.values())
            shares[name] = 1.0 - removed
    # the logarithms are those of errors in units in which all are above e
    scaled = [
        Candidate(item.name, item.out_features, item.in_features, item.energies * 1e4, item.kind)
        for item in items
        if item.energies is not None
    ]
    found = STRATEGIES["svd_llm_v2"].allocate(scaled, ratio, multiple, Settings())
    check(items, shares, ratio, multiple, ranks_of(found))


@of_many_sizes
def test_asvd_by_every_bound(seed: int, ratio: float, multiple: int) -> None:
    items = made(seed)
    budget = ratio * sum(params(item, None) for item in items)
    shares: dict[str, float] = {}
    for bound in sorted(value for item in items for _, value in item.trials or ()):
        shares = {
            item.name: min([s for s, value in item.trials or () if value <= bound] or [1.0])
            for item in items
        }
        if sum(shares[item.name] * params(item, None) for item in items) <= budget:
            break
    found = STRATEGIES["asvd"].allocate(items, ratio, multiple, AsvdTrials())
    check(items, shares, ratio, multiple, ranks_of(found))


@of_many_sizes
def test_dobi_svd_and_lorc(seed: int, ratio: float, multiple: int) -> None:
    items = made(seed)
    shares = {i.name: (i.position or 0) * params(i, 1) / params(i, None) for i in items}
    found = STRATEGIES["dobi_svd"].allocate(items, ratio, multiple, DobiPositions())
    check(items, shares, ratio, multiple, ranks_of(found))
    # the product, over this block and all later ones, of largest over smallest singular value
    products = []
    for block in range(3):
        later = [i.energies for i in items if i.block >= block and i.energies is not None]
        products.append(np.prod([np.sqrt(values[0] / values[-1]) for values in later]))
    logs = np.log(products)
    depth = (logs.max() - logs) / (logs.max() - logs.min())
    shares = {item.name: 1.0 - 0.75 * float(depth[item.block]) for item in items}
    found = STRATEGIES["lorc"].allocate(items, ratio, multiple, LorcDepth(min_ratio=0.25))
    check(items, shares, ratio, multiple, ranks_of(found))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiple", [1, 8, 32])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.95])
def test_uniform_is_nearest_of_all_ranks(seed: int, multiple: int, ratio: float) -> None:
    items = made(seed)
    found = ranks_of(STRATEGIES["uniform"].allocate(items, ratio, multiple, Settings()))
    for item in items:
        wanted = ratio * params(item, None)
        ranks = range(multiple, 200, multiple)
        nearest = min(ranks, key=lambda k: (abs(params(item, k) - wanted), -k))
        dense = params(item, nearest) >= params(item, None)
        assert found[item.name] == (None if dense else nearest)


def spaced(count: int) -> np.ndarray:
    return np.logspace(-8, 4, count)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiple", [1, 8])
def test_greedy_is_the_optimum_at_the_budget_of_every_multiplier(seed: int, multiple: int) -> None:
    """Everett: what minimises loss + x params, for any x, has the least loss of its budget."""
    items = made(seed)
    options: dict[str, list[tuple[int, float, int | None]]] = {}
    for item in items:
        assert item.energies is not None
        ranks = [k for k in range(multiple, 200, multiple) if params(item, k) < params(item, None)]
        options[item.name] = [
            *((params(item, k), float(sum(item.energies[k:])), k) for k in ranks),
            (params(item, None), 0.0, None),
        ]
    dense = sum(params(item, None) for item in items)
    seen = set()
    for price in spaced(60):
        best = {n: min(found, key=lambda o: o[1] + price * o[0]) for n, found in options.items()}
        budget, loss = sum(o[0] for o in best.values()), sum(o[1] for o in best.values())
        seen.add(budget)
        chosen = STRATEGIES["greedy"].allocate(items, (budget + 0.5) / dense, multiple, Settings())
        got = {
            name: next(o for o in options[name] if o[2] == rank)
            for name, rank in ranks_of(chosen).items()
        }
        assert sum(o[0] for o in got.values()) <= budget
        assert sum(o[1] for o in got.values()) <= loss * (1 + 1e-9) + 1e-9
    assert len(seen) > 5


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_by_bytes_is_the_optimum_at_the_budget_of_every_multiplier(seed: int) -> None:
    random = np.random.default_rng(seed)
    options = {
        str(part): [
            Option(int(random.integers(10, 200)), float(random.random()), i, ("t",))
            for i in range(6)
        ]
        for part in range(5)
    }
    for price in spaced(60):
        best = [min(o, key=lambda x: (x.loss + price * x.bytes, x.bytes)) for o in options.values()]
        chosen = choose(options, sum(o.bytes for o in best)).values()
        assert sum(o.bytes for o in chosen) <= sum(o.bytes for o in best)
        assert sum(o.loss for o in chosen) <= sum(o.loss for o in best) + 1e-12


def test_positions_are_learned_by_descent_on_the_papers_loss() -> None:
    """The same steps with torch's own SVD and its gradient, all outputs truncated softly."""
    rate, ratio, beta = 0.7, 0.4, 1.0
    settings = DobiPositions(
        iterations=4, rate=rate, beta=beta, ratio_weight=30.0, range_weight=5.0
    )
    model = llama(initializer_range=0.2)
    groups = select(discover(model), ("re:",), (), group=True)
    found = learn_positions(model, groups, TOKENS, ratio, settings)

    shapes = [(sum(m.out_features for m in g.members), g.members[0].in_features) for g in groups]
    positions = torch.tensor([ratio * m * n / (m + n) for m, n in shapes], requires_grad=True)
    parts: dict[str, Tensor] = {}
    for i, group in enumerate(groups):
        modules = {m.name: model.get_submodule(m.name) for m in group.members}

        def cut(_m: Any, args: Any, i: int = i, modules: dict[str, Any] = modules) -> None:
            y = torch.cat([args[0][0] @ module.weight.T for module in modules.values()], dim=1)
            u, s, vt = torch.linalg.svd(y.double(), full_matrices=False)
            numbers = torch.arange(1, len(s) + 1)
            mask = 0.5 * torch.tanh(beta * (positions[i] - numbers)) + 0.5
            cut_down = (u @ torch.diag(s * mask) @ vt).float()
            sizes = [len(module.weight) for module in modules.values()]
            parts.update(zip(modules, cut_down.split(sizes, dim=1), strict=True))

        modules[group.leader].register_forward_pre_hook(cut)
        for name, module in modules.items():
            module.register_forward_hook(lambda _m, _a, _o, name=name: parts[name][None])
    optimizer = torch.optim.Adam([positions], lr=rate)
    dense = sum(m * n for m, n in shapes)
    for step in range(4):
        text = TOKENS[step : step + 1]
        logits = model(text, use_cache=False).logits[0, :-1]
        loss = torch.exp(torch.nn.functional.cross_entropy(logits, text[0, 1:]))
        kept: Any = 0.0
        for position, (m, n) in zip(positions, shapes, strict=True):
            limit = float((m * n - 1) // (m + n))
            kept = kept + position.clamp(max=limit) * (m + n) / dense
            outside = (1 - position).clamp(min=0) + (position - limit).clamp(min=0)
            loss = loss + 5.0 * (outside / limit) ** 2
        loss = loss + 30.0 * (kept - ratio).abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for group, position, (m, n) in zip(groups, positions, shapes, strict=True):
        expected = min(max(1.0, position.item()), (m * n - 1) // (m + n))
        assert found[group.leader] == pytest.approx(expected, abs=0.02), group.leader
    assert len({round(value, 2) for value in found.values()}) > 4
