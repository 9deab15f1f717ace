"""Allocation: budgets are kept, ranks suit the runtime, and the result is the best there is."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdexport.allocate import STRATEGIES, Allocation, Candidate, greedy, uniform
from svdexport.allocate.base import by_ratios
from svdexport.core.lowrank import break_even_rank
from svdexport.errors import RecipeError
from svdexport.recipe import Compress
from svdexport.recipe.settings import (
    ALLOCATION_SETTINGS,
    Adacr,
    AsvdTrials,
    DobiPositions,
    LorcDepth,
    Settings,
)


def candidates(seed: int, count: int = 3) -> list[Candidate]:
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        m, n = (int(v) for v in random.integers(40, 120, size=2))
        energies = np.sort(random.gamma(0.3, 10.0 ** random.integers(-1, 2), size=min(m, n)))[::-1]
        made.append(Candidate(f"layer{i}", m, n, energies))
    return made


def cost(items: list[Candidate], ranks: dict[str, int | None]) -> int:
    return sum(item.cost(ranks[item.name]) for item in items)


def loss(items: list[Candidate], ranks: dict[str, int | None]) -> float:
    total = 0.0
    for item in items:
        rank = ranks[item.name]
        assert item.energies is not None
        total += 0.0 if rank is None else float(item.energies[rank:].sum())
    return total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.3, 1.0), multiple=st.sampled_from([1, 4, 8]))
def test_greedy_keeps_the_budget_and_the_multiple(seed: int, ratio: float, multiple: int) -> None:
    items = candidates(seed, 5)
    chosen = greedy.allocate(items, ratio, multiple)
    ranks = {name: c.rank for name, c in chosen.items()}
    assert cost(items, ranks) <= ratio * sum(item.dense_params for item in items)
    for item in items:
        rank = ranks[item.name]
        if rank is None:
            assert chosen[item.name].reason
            continue
        assert rank % multiple == 0
        assert item.cost(rank) < item.dense_params


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_near_the_best_of_all_choices(seed: int) -> None:
    items = candidates(seed)
    budget = 0.7 * sum(item.dense_params for item in items)
    options: list[list[int | None]] = [[*item.ranks(8), None] for item in items]
    best = min(
        loss(items, dict(zip([i.name for i in items], ranks, strict=True)))
        for ranks in itertools.product(*options)
        if cost(items, dict(zip([i.name for i in items], ranks, strict=True))) <= budget
    )
    chosen = greedy.allocate(items, 0.7, 8)
    found = loss(items, {name: c.rank for name, c in chosen.items()})
    total = sum(float(item.energies.sum()) for item in items if item.energies is not None)
    # one hull segment that does not fit is what greedy may lose against the exact knapsack
    assert found - best <= 0.03 * total


@pytest.mark.parametrize("seed", range(8))
def test_no_next_rank_that_gains_would_still_fit(seed: int) -> None:
    items = candidates(seed, 5)
    dense = sum(item.dense_params for item in items)
    for ratio in np.linspace(0.4, 0.95, 12):
        chosen = greedy.allocate(items, float(ratio), 8)
        ranks = {name: c.rank for name, c in chosen.items()}
        left = int(ratio * dense) - cost(items, ranks)
        for item in items:
            steps: list[int | None] = [*item.ranks(8), None]
            at = steps.index(ranks[item.name])
            if at + 1 == len(steps):
                continue
            more = {**ranks, item.name: steps[at + 1]}
            gain = loss(items, ranks) - loss(items, more)
            if gain > 1e-9 * loss(items, ranks):
                assert cost(items, more) - cost(items, ranks) > left


def test_greedy_with_too_small_a_budget_says_so() -> None:
    with pytest.raises(RecipeError, match="too small"):
        greedy.allocate(candidates(0), 0.05, 32)


def test_greedy_gives_everything_where_everything_fits() -> None:
    chosen = greedy.allocate(candidates(1), 1.0, 8)
    assert all(choice.rank is None for choice in chosen.values())


def test_uniform_rounds_to_the_multiple_and_stays_dense_past_break_even() -> None:
    items = [Candidate("wide", 576, 1536), Candidate("tall", 960, 576), Candidate("thin", 8, 64)]
    chosen = uniform.allocate(items, 0.8, 32)
    assert chosen["wide"].rank == 320  # 0.8 * 576 * 1536 / 2112 = 335
    assert chosen["tall"].rank == 288
    assert chosen["thin"].rank is None
    assert "break-even" in chosen["thin"].reason
    past = uniform.allocate(items, 0.999, 64)  # 418.5 rounds to 448; break-even is 418
    assert past["wide"].rank is None
    assert "break-even" in past["wide"].reason


@given(m=st.integers(1, 400), n=st.integers(1, 400))
def test_break_even_is_the_last_rank_that_saves(m: int, n: int) -> None:
    k = break_even_rank(m, n)
    assert k * (m + n) < m * n
    assert (k + 1) * (m + n) >= m * n


def params(items: list[Candidate], chosen: dict[str, Allocation]) -> int:
    return sum(item.cost(chosen[item.name].rank) for item in items)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.3, 1.0), multiple=st.sampled_from([1, 4, 8]))
def test_ratios_of_a_strategy_are_scaled_to_the_budget(
    seed: int, ratio: float, multiple: int
) -> None:
    items = candidates(seed, 5)
    wanted = dict(zip([i.name for i in items], (0.2, 0.4, 0.6, 0.9, 1.0), strict=True))
    chosen = by_ratios(items, wanted, ratio, multiple)
    budget = ratio * sum(item.dense_params for item in items)
    assert params(items, chosen) <= budget
    # one more step of every pair would exceed it: nothing large was left unspent
    more = sum(
        item.cost(rank if (rank := chosen[item.name].rank) is None else rank + multiple)
        for item in items
    )
    all_dense = all(choice.rank is None for choice in chosen.values())
    jump = max(item.dense_params - item.cost(item.ranks(multiple)[-1]) for item in items)
    assert all_dense or more + jump >= budget


def test_adacr_keeps_more_of_blocks_that_change_their_input_less() -> None:
    energies = np.ones(100)
    items = [
        Candidate(f"l{i}", 100, 100, energies, "q", i, similarity)
        for i, similarity in enumerate((0.9, 0.6, 0.3))
    ]
    chosen = STRATEGIES["adacr"].allocate(items, 0.5, 1, Adacr(min_ratio=0.2))
    # kept = 0.2 + I (0.5 - 0.2), I = similarity / 0.6; rank = kept * 50
    assert [chosen[f"l{i}"].rank for i in range(3)] == [
        pytest.approx(50 * (0.2 + 0.3 * s / 0.6), abs=1.0) for s in (0.9, 0.6, 0.3)
    ]


def test_svd_llm_v2_removes_by_the_inverse_logarithm_of_the_loss_within_a_type() -> None:
    losses = (10.0, 100.0, 1000.0)
    items = []
    for i, loss in enumerate(losses):
        energies = np.zeros(100)
        energies[-1] = loss**2  # all of it dropped at any rank below 100
        items.append(Candidate(f"q{i}", 100, 100, energies, "q", i))
    items.append(Candidate("other", 100, 100, np.ones(100), "o", 0))
    chosen = STRATEGIES["svd_llm_v2"].allocate(items, 0.6, 1, Settings())
    inverse = [1 / np.log(loss) for loss in losses]
    removed = [0.4 * 3 * value / sum(inverse) for value in inverse]
    found = [chosen[f"q{i}"].rank for i in range(3)]
    assert found == [pytest.approx(50 * (1 - r), abs=1.0) for r in removed]
    assert chosen["other"].rank == pytest.approx(30, abs=1)


def test_every_strategy_can_be_named_in_a_recipe() -> None:
    assert set(get_args(Compress.model_fields["allocate"].annotation)) == set(STRATEGIES)
    assert set(ALLOCATION_SETTINGS) <= set(STRATEGIES)


def test_asvd_takes_the_least_share_within_one_bound() -> None:
    trials = {
        "robust": ((0.2, 10.5), (0.5, 10.2), (0.8, 10.1)),
        "middle": ((0.2, 14.0), (0.5, 10.6), (0.8, 10.2)),
        "fragile": ((0.2, 90.0), (0.5, 30.0), (0.8, 10.7)),
    }
    items = [Candidate(name, 100, 100, trials=found) for name, found in trials.items()]
    chosen = STRATEGIES["asvd"].allocate(items, 0.5, 1, AsvdTrials())
    # at a bound of 10.7 the shares are 0.2, 0.5 and 0.8, which is the budget
    assert [chosen[name].rank for name in trials] == [10, 25, 40]


def test_dobi_svd_rounds_and_scales_learned_positions() -> None:
    items = [Candidate(f"l{i}", 100, 100, position=p) for i, p in enumerate((12.3, 24.9, 40.2))]
    chosen = STRATEGIES["dobi_svd"].allocate(items, 0.5, 1, DobiPositions())
    assert [chosen[f"l{i}"].rank for i in range(3)] == [
        pytest.approx(p * 75 / 77.4, abs=1.0) for p in (12.3, 24.9, 40.2)
    ]
    assert sum(item.cost(chosen[item.name].rank) for item in items) <= 0.5 * 3 * 100 * 100


def test_lorc_keeps_more_of_shallow_blocks_and_can_leave_them_dense() -> None:
    items = []
    for block, smallest in enumerate((1.0, 0.1, 0.01)):
        energies = np.linspace(100.0, smallest, 100)
        items.append(Candidate(f"k{block}", 100, 100, energies, "k", block))
    logs = [0.5 * np.log(100.0 / s) for s in (1.0, 0.1, 0.01)]
    cumulative = [sum(logs[i:]) for i in range(3)]
    span = cumulative[0] - cumulative[2]
    shares = [1 - 0.75 * (cumulative[0] - c) / span for c in cumulative]
    chosen = STRATEGIES["lorc"].allocate(items, 0.4, 1, LorcDepth(min_ratio=0.25))
    ranks = [chosen[f"k{b}"].rank for b in range(3)]
    assert ranks[0] is not None
    for rank, share in zip(ranks, shares, strict=True):
        assert rank == pytest.approx(ranks[0] * share / shares[0], abs=1.5)
    protected = STRATEGIES["lorc"].allocate(items, 0.6, 1, LorcDepth(protect=1))
    assert protected["k0"].rank is None
    assert "dense" in protected["k0"].reason
    assert protected["k2"].rank is not None
