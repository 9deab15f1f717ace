"""The published methods against their papers' formulas, plainly, in float64."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from svdexport.core.decompose import fit_of_optimum
from svdexport.core.lowrank import FactorPair
from svdexport.core.pca import IncrementalPca
from svdexport.factorize import METHODS, GroupData
from svdexport.recipe import Compress
from svdexport.recipe.settings import METHOD_SETTINGS, BasisSharing, Settings
from tests.unit.test_decompose import moment

SHAPES = [(24, 16), (16, 24), (16, 16)]
M, N = 24, 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(shape: tuple[int, int], method: str, **settings: object) -> GroupData:
    """Two linears of ``shape`` together, with statistics that belong to no real model."""
    m, n = shape
    weight = torch.randn(m, n, generator=generator(1), dtype=torch.float64)
    spread = torch.logspace(-1, 1, n, dtype=torch.float64)
    fisher = torch.rand(m, n, generator=generator(2), dtype=torch.float64) * spread
    sizes = [m - m // 3, m // 3]
    return GroupData(
        weights=tuple(weight.split(sizes)),
        inputs=moment(n, 300, 3),
        gradients=None,
        max_rank=min(m, n),
        damping=0.1,
        settings=METHOD_SETTINGS.get(method, Settings)(**settings),
        mean_abs=torch.rand(n, generator=generator(4), dtype=torch.float64) * spread,
        fisher=tuple(fisher.split(sizes)),
        rows=torch.randn(90, n, generator=generator(7), dtype=torch.float64) * spread,
    )


def product(method: str, given: GroupData, rank: int) -> Tensor:
    return METHODS[method].factorize(given).pair(rank).dense().double()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> bool:
    return torch.allclose(found, expected, atol=tolerance * float(expected.abs().max()))


def test_every_method_can_be_named_in_a_recipe() -> None:
    assert set(get_args(Compress.model_fields["method"].annotation)) == {*METHODS, "none"}
    assert set(METHOD_SETTINGS) <= set(METHODS)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], method: str) -> None:
    given = data(shape, method)
    moments = tuple(moment(w.shape[0], 100, 5) for w in given.weights)
    given = dataclasses.replace(given, gradients=moments)
    weight = torch.cat(given.weights)
    assert close(product(method, given, min(shape)), weight, 1e-3)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_lorc_and_svd_llm_are_truncations(shape: tuple[int, int], rank: int) -> None:
    given = data(shape, "svd")
    weight = torch.cat(given.weights)
    for method in ("svd", "lorc"):
        assert close(product(method, given, rank), truncated(weight, rank))
    assert given.inputs is not None
    s = torch.linalg.cholesky(given.inputs)
    expected = truncated(weight @ s, rank) @ torch.linalg.inv(s)
    assert close(product("svd_llm", given, rank), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_kfac_svd_is_the_svd_between_both_roots(shape: tuple[int, int], rank: int) -> None:
    given = data(shape, "kfac_svd")
    moments = [moment(w.shape[0], 100, 5 + i) for i, w in enumerate(given.weights)]
    given = dataclasses.replace(given, gradients=tuple(moments), damping=0.3)
    damped = [g + 0.3 * g.trace() / len(g) * torch.eye(len(g)).double() for g in moments]
    left = torch.linalg.cholesky(torch.block_diag(*damped)).T
    assert given.inputs is not None
    right = root(given.inputs)
    weighted = left @ torch.cat(given.weights) @ right
    expected = torch.linalg.inv(left) @ truncated(weighted, rank) @ torch.linalg.inv(right)
    assert close(product("kfac_svd", given, rank), expected)
    found = METHODS["kfac_svd"].factorize(given).energies[rank:].sum()
    dropped = torch.linalg.svdvals(weighted)[rank:].square().sum()
    assert torch.isclose(found, dropped, atol=1e-5 * float(weighted.square().sum()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_rank_asked_for_is_there_whatever_the_text_was(
    shape: tuple[int, int], method: str
) -> None:
    """Three tokens, half of the channels silent: fewer directions than the ranks in question."""
    given = data(shape, method)
    rows = torch.randn(3, shape[1], generator=generator(8), dtype=torch.float64)
    rows[:, ::2] = 0.0
    signal = rows.abs().mean(dim=0)
    moments = tuple(moment(w.shape[0], 100, 5) for w in given.weights)
    given = dataclasses.replace(given, gradients=moments)
    usual = METHODS[method].factorize(given)
    given = dataclasses.replace(
        given,
        inputs=rows.T @ rows,
        gradients=tuple(moment(w.shape[0], 2, 5) for w in given.weights),
        mean_abs=signal,
        fisher=tuple(f * signal for f in given.fisher or ()),
        rows=rows,
    )
    found = METHODS[method].factorize(given)
    assert found.energies.shape == usual.energies.shape  # those of experts are added up
    assert (found.a.shape, found.b.shape) == ((16, shape[1]), (shape[0], 16))
    assert torch.isfinite(found.a).all() and torch.isfinite(found.b).all()
    outputs = torch.cat(given.weights) @ rows.T
    left = outputs - found.pair(16).dense().double() @ rows.T
    assert float(left.norm()) < 1e-3 * float(outputs.norm())
    if method in ("svd_llm_v2", "dobi_svd"):  # which see three directions; W's SVD follows
        weight = torch.cat(given.weights)
        seen, all_of_it = (found.pair(k).dense().double() for k in (3, 16))
        left = truncated(weight - seen, 13)
        assert close(all_of_it, seen + left)
        assert float((outputs - seen @ rows.T).norm()) < 1e-4
        assert float(found.energies[3:].sum()) < 1e-9 * float(found.energies.sum())


def test_fitting_needs_the_energies_of_every_rank() -> None:
    given = data((24, 16), "svd_llm_v2")
    x = torch.randn(3, 16, generator=generator(8), dtype=torch.float64)
    found = METHODS["svd_llm_v2"].factorize(dataclasses.replace(given, inputs=x.T @ x))
    assert fit_of_optimum(found).errors.shape == (16,)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_fwsvd_is_the_svd_of_the_row_weighted_matrix(shape: tuple[int, int], rank: int) -> None:
    given = data(shape, "fwsvd")
    assert given.fisher is not None
    importance = torch.cat(given.fisher).sum(dim=0).sqrt()
    expected = truncated(torch.cat(given.weights) * importance, rank) / importance
    assert close(product("fwsvd", given, rank), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_svd_of_the_scaled_matrix(shape: tuple[int, int], alpha: float) -> None:
    given = data(shape, "asvd", alpha=alpha)
    assert given.mean_abs is not None
    scale = given.mean_abs**alpha
    expected = truncated(torch.cat(given.weights) * scale, 5) / scale
    assert close(product("asvd", given, 5), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_llm_v2_by_two_svds(shape: tuple[int, int], rank: int) -> None:
    given = data(shape, "svd_llm_v2")
    assert given.inputs is not None
    u, s, _ = torch.linalg.svd(given.inputs)
    root = u @ torch.diag(s.sqrt())
    weight = torch.cat(given.weights)
    expected = truncated(weight @ root, rank) @ torch.linalg.inv(root)
    assert close(product("svd_llm_v2", given, rank), expected)
    found = METHODS["svd_llm_v2"].factorize(given)
    error = torch.linalg.matrix_norm((weight - expected) @ root) ** 2
    assert torch.isclose(found.energies[rank:].sum(), error, rtol=1e-6)


def test_svd_llm_v2_needs_no_damping_for_a_singular_moment() -> None:
    x = torch.randn(5, N, generator=generator(6), dtype=torch.float64)
    x[:, 3] = 0.0
    given = data((M, N), "svd_llm_v2")
    for h, rank in ((x.T @ x, 5), (torch.zeros(N, N, dtype=torch.float64), N)):
        singular = GroupData(given.weights, h, None, N, 0.1)
        found = METHODS["svd_llm_v2"].factorize(singular)
        weight = torch.cat(given.weights)
        assert torch.isfinite(found.a).all()
        error = (weight - found.pair(rank).dense().double()) @ x.T
        assert float(error.norm() / (weight @ x.T).norm()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 7])
@pytest.mark.parametrize("iterations", [1, 3])
def test_adasvd_is_the_alternation_with_pseudo_inverses(
    shape: tuple[int, int], rank: int, iterations: int
) -> None:
    given = data(shape, "adasvd", iterations=iterations)
    weight, h = torch.cat(given.weights), given.inputs
    assert h is not None
    left, s, _ = torch.linalg.svd(weight)
    u = left[:, :rank] @ torch.diag(s[:rank])
    v = torch.linalg.pinv(u) @ weight
    for _ in range(iterations):
        u = weight @ h @ v.T @ torch.linalg.pinv(v @ h @ v.T)
        v = torch.linalg.pinv(u) @ weight
    assert close(product("adasvd", given, rank), u @ v, 1e-3)
    found = METHODS["adasvd"].factorize(given)
    difference = weight - u @ v
    error = torch.trace(difference @ h @ difference.T)
    assert torch.isclose(found.energies[rank:].sum(), error, rtol=1e-3)


def test_adasvd_ends_at_the_whitened_optimum() -> None:
    given = data((M, N), "adasvd", iterations=1000)
    assert close(product("adasvd", given, 4), product("svd_llm", given, 4), 1e-3)


def weighted_error(weight: Tensor, importance: Tensor, approximate: Tensor) -> float:
    return float((importance * (weight - approximate).square()).sum())


def finished(given: GroupData, rank: int) -> FactorPair:
    method = METHODS["tfwsvd"]
    assert method.keep is not None
    assert method.finish is not None
    start = method.factorize(given).pair(rank)
    return method.finish(start, method.keep(given), given.settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 3])
def test_tfwsvd_is_alternating_weighted_least_squares_row_by_row(
    shape: tuple[int, int], iterations: int
) -> None:
    rank = 4
    given = data(shape, "tfwsvd", iterations=iterations, steps=4 * rank)
    assert given.fisher is not None
    weight, fisher = torch.cat(given.weights), torch.cat(given.fisher)
    floored = fisher / fisher.mean() + 1e-4
    start = METHODS["fwsvd"].factorize(given).pair(rank)
    a, b = start.a.double(), start.b.double()

    def solve(w: Tensor, f: Tensor, fixed: Tensor) -> Tensor:
        rows = []
        for i in range(w.shape[0]):
            root = f[i].sqrt()
            rows.append(torch.linalg.lstsq((fixed * root).T, w[i] * root).solution)
        return torch.stack(rows)

    for _ in range(iterations):
        b = solve(weight, floored, a)
        a = solve(weight.T, floored.T, b.T).T
    found = finished(given, rank).dense().double()
    assert weighted_error(weight, floored, found) == pytest.approx(
        weighted_error(weight, floored, b @ a), rel=1e-5
    )


def test_tfwsvd_lowers_the_weighted_error_of_fwsvd_in_few_steps() -> None:
    given = data((M, N), "tfwsvd", iterations=2, steps=2)
    assert given.fisher is not None
    weight, fisher = torch.cat(given.weights), torch.cat(given.fisher)
    start = METHODS["fwsvd"].factorize(given).pair(4).dense().double()
    found = finished(given, 4).dense().double()
    before, after = (weighted_error(weight, fisher, value) for value in (start, found))
    assert after < 0.97 * before


@pytest.mark.parametrize("shape", SHAPES)
def test_dobi_svd_projects_on_the_outputs_principal_directions(shape: tuple[int, int]) -> None:
    given = data(shape, "dobi_svd", part=1000)  # all rows at once: nothing is truncated before
    assert given.rows is not None
    weight = torch.cat(given.weights)
    left = torch.linalg.svd(weight @ given.rows.T)[0][:, :5]
    assert close(product("dobi_svd", given, 5), left @ left.T @ weight)
    found = METHODS["dobi_svd"].factorize(given)
    outputs = weight @ given.rows.T
    error = (outputs - left @ left.T @ outputs).square().sum()
    assert torch.isclose(found.energies[5:].sum(), error, rtol=1e-6)


def test_incremental_pca_in_parts_is_near_the_pca_of_all() -> None:
    mixing = torch.randn(20, 20, generator=generator(1), dtype=torch.float64)
    rows = torch.randn(400, 20, generator=generator(2), dtype=torch.float64) @ mixing
    exact, small = IncrementalPca(20, 20), IncrementalPca(20, 8)
    for part in rows.split(7):
        exact.add(part)
        small.add(part)
    values = torch.linalg.eigvalsh(rows.T @ rows).flip(0)
    assert torch.allclose(exact.squares, values, rtol=1e-8)
    assert torch.isclose(small.energies().sum(), values.sum(), rtol=1e-9)
    kept = (rows @ small.directions[:, :4]).square().sum()
    assert float(kept) > 0.97 * float(values[:4].sum())


def neighbours(refit: bool) -> list[GroupData]:
    made = []
    for seed in (1, 2):
        weight = torch.randn(M, N, generator=generator(seed), dtype=torch.float64)
        made.append(
            GroupData(
                weights=(weight,),
                inputs=moment(N, 200, 10 + seed),
                gradients=None,
                max_rank=N,
                damping=0.1,
                settings=BasisSharing(refit=refit),
            )
        )
    return made


@pytest.mark.parametrize("refit", [False, True])
def test_basis_sharing_across_two_blocks(refit: bool) -> None:
    rank = 5
    blocks = neighbours(refit)
    across = METHODS["basis_sharing"].factorize_across
    assert across is not None
    moments = [block.inputs for block in blocks]
    assert moments[0] is not None
    assert moments[1] is not None
    s = torch.linalg.cholesky(moments[0] + moments[1])
    stacked = torch.cat([block.weights[0] for block in blocks])
    expected = (truncated(stacked @ s, rank) @ torch.linalg.inv(s)).split(M)
    vt = torch.linalg.svd(stacked @ s)[2]
    basis = vt[:rank] @ torch.linalg.inv(s)
    for block, found, plain, h in zip(blocks, across(blocks), expected, moments, strict=True):
        weight = block.weights[0]
        best = weight @ h @ basis.T @ torch.linalg.inv(basis @ h @ basis.T) @ basis
        wanted = best if refit else plain
        assert close(found.pair(rank).dense().double(), wanted)
        difference = weight - wanted
        error = torch.trace(difference @ h @ difference.T)
        assert torch.isclose(found.energies[rank:].sum(), error, rtol=1e-3)
