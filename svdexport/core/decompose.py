"""The best low-rank pair of a linear layer, or of stacked layers with one input, at every rank.

Minimises ||G^1/2 (W - B A) H^1/2||_F with H the second moment of the inputs and G that of the
output gradients (the Kronecker-factored Fisher; G = I gives SVD-LLM's truncation-aware whitening,
Wang et al., ICLR 2025, arXiv 2403.07378; H = I too gives the plain SVD, Eckart and Young, 1936).
One symmetric eigenproblem of the smaller side and one Cholesky factor of that side; no inverse of
H where the outputs are fewer, none of G where the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdexport.core.lowrank import FactorPair
from svdexport.core.moments import add_upper, gram, mirror
from svdexport.core.products import SMALLEST_DOUBLE, eigh, multiply, times_lower

INPUT_DAMPING = 1e-6  # of H's mean eigenvalue: only against singularity
MAX_RETRIES = 12
ROWS = 2048  # of a stacked weight that are in float64 at once: it may be a gigabyte as a whole


@dataclass(frozen=True)
class Decomposition:
    """Nested factors: the first k rows of ``a`` and columns of ``b`` are the best rank-k pair.

    Attributes:
        a: (r, n), float32. b: (m, r), float32, members stacked along m.
        energies: all squared singular values of G^1/2 W H^1/2, descending, float64; the error of
            rank k is the sum of those after the k-th.
        damping: what was added to the factored moment, in units of its mean eigenvalue.
    """

    a: Tensor
    b: Tensor
    energies: Tensor
    damping: float

    def pair(self, rank: int) -> FactorPair:
        """The rank-k pair. Raises ValueError beyond the ranks that were kept."""
        if not 1 <= rank <= self.a.shape[0]:
            raise ValueError(f"rank {rank} is not within 1..{self.a.shape[0]}")
        return FactorPair(self.a[:rank].contiguous(), self.b[:, :rank].contiguous())


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``moment + d * mean eigenvalue * I`` and the d that was needed.

    Starts at ``damping`` and multiplies by ten until the factorisation succeeds; a zero moment is
    treated as the identity. Raises ValueError where the moment is not finite.
    """
    mean = float(moment.diagonal().mean())
    if not torch.isfinite(moment).all():
        raise ValueError("the moment matrix has NaN or infinite entries")
    if mean <= 0.0:
        return torch.eye(moment.shape[0], dtype=moment.dtype), 1.0
    for _ in range(MAX_RETRIES):
        factor, info = torch.linalg.cholesky_ex(_plus_diagonal(moment, damping * mean))
        if int(info) == 0:
            return factor, damping
        damping = max(damping * 10.0, 1e-12)
    raise ValueError("the moment matrix is not positive semidefinite even with damping")


def decompose(
    weights: Sequence[Tensor],
    input_moment: Tensor | None = None,
    output_moments: Sequence[Tensor] | None = None,
    *,
    max_rank: int | None = None,
    output_damping: float = 0.1,
) -> Decomposition:
    """Factorise one linear, or several that share an input (their rows stacked, one shared A).

    Args:
        weights: W_i of shape (m_i, n).
        input_moment: H (n, n), or None for the identity.
        output_moments: G_i (m_i, m_i), or None for the identity; damped by ``output_damping`` of
            their mean eigenvalue, since few gradients leave directions that seem free. Where all
            are zero the factors are those of the identity, and the energies are zero: nothing
            that is dropped costs loss.
        max_rank: factors are kept up to this rank; energies always in full.
    """
    m, n = sum(len(w) for w in weights), weights[0].shape[1]
    limit = min(m, n, max_rank or min(m, n))
    one_sided = _by_inputs if n <= m else _by_outputs
    found = one_sided(weights, input_moment, output_moments, output_damping, limit)
    if output_moments is not None and without_signal(output_moments):
        return replace(found, energies=torch.zeros_like(found.energies))
    return found


def without_signal(moments: Sequence[Tensor]) -> bool:
    """Whether all the second moments are zero."""
    return all(float(moment.diagonal().mean()) <= 0.0 for moment in moments)


def damped(moments: Sequence[Tensor], damping: float) -> Iterator[Tensor]:
    """The output gradients' moments G_i (m_i, m_i) of a group as they weight its error, float64.

    To each ``damping`` of its mean eigenvalue is added. A zero one gets that share of the others'
    average, so that it does not outweigh them; where all are zero each is the identity.
    """
    for moment, add in zip(moments, _added(moments, damping), strict=True):
        yield _plus_diagonal(moment.double(), add)


def _added(moments: Sequence[Tensor], damping: float) -> list[float]:
    """What :func:`damped` adds to each diagonal."""
    means = [float(moment.diagonal().mean()) for moment in moments]
    live = [mean for mean in means if not mean <= 0.0]  # NaN too: it must not pass for zero
    if not live:
        return [1.0] * len(means)
    instead = max(damping, INPUT_DAMPING) * sum(live) / len(live)
    return [instead if mean <= 0.0 else damping * mean for mean in means]


def _plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    """matrix + value I, without an identity of that size."""
    result = matrix.clone()
    result.diagonal().add_(value)
    return result


def _by_inputs(
    weights: Sequence[Tensor],
    input_moment: Tensor | None,
    output_moments: Sequence[Tensor] | None,
    output_damping: float,
    limit: int,
) -> Decomposition:
    """n <= m. With H = S S^T and V the eigenvectors of S^T W^T G W S: B = W S V, A = V^T S^-1."""
    root, damping = None, 0.0
    if input_moment is not None:
        root, damping = damped_cholesky(input_moment.double(), INPUT_DAMPING)
    square = _gram(weights, output_moments, output_damping)
    if root is not None:
        square = multiply(multiply(root.T, square), root)
    energies, v = eigen_descending(square, limit)
    if root is None:
        a, right = v.T, v
    else:
        a = torch.linalg.solve_triangular(root, v.T, upper=False, left=False)
        right = multiply(root, v)
    b = torch.cat([multiply(rows.double(), right).float() for rows in _row_blocks(weights)])
    return Decomposition(a.float().contiguous(), b, energies, damping)


def _gram(
    weights: Sequence[Tensor], moments: Sequence[Tensor] | None, output_damping: float
) -> Tensor:
    """W^T G W of the stacked weights with damped G, (n, n); no copy of a G, which may be large."""
    square = torch.zeros((weights[0].shape[1],) * 2, dtype=torch.float64)
    if moments is None:
        for rows in _row_blocks(weights):
            add_upper(square, rows.double())
        mirror(square)
        return square
    for weight, moment, add in zip(weights, moments, _added(moments, output_damping), strict=True):
        full = weight.double()
        for rows, metric in zip(torch.split(full, ROWS), torch.split(moment, ROWS), strict=True):
            square += multiply(rows.T, multiply(metric.double(), full) + add * rows)
    return square


def _row_blocks(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    for weight in weights:
        yield from torch.split(weight, ROWS)


def _by_outputs(
    weights: Sequence[Tensor],
    input_moment: Tensor | None,
    output_moments: Sequence[Tensor] | None,
    output_damping: float,
    limit: int,
) -> Decomposition:
    """m < n. With G = L L^T and U the eigenvectors of L^T W H W^T L: B = L^-T U, A = U^T L^T W."""
    weight = torch.cat([w.double() for w in weights]) if len(weights) > 1 else weights[0].double()
    square = gram(weight.T) if input_moment is None else quadratic(weight, input_moment.double())
    root = None
    if output_moments is not None:
        roots = [damped_cholesky(g, 0.0)[0] for g in damped(output_moments, output_damping)]
        root = torch.block_diag(*roots)  # type: ignore[no-untyped-call]
        square = multiply(multiply(root.T, square), root)
    energies, u = eigen_descending(square, limit)
    if root is not None:
        a = multiply(multiply(root, u).T, weight)
        b = torch.linalg.solve_triangular(root.T, u, upper=True)
    elif _single_will_do(weights, input_moment, energies, limit):
        b = u.float()
        a = multiply(b.T, weights[0])
    else:
        a, b = multiply(u.T, weight), u
    return Decomposition(a.float().contiguous(), b.float().contiguous(), energies, 0.0)


def _single_will_do(
    weights: Sequence[Tensor], moment: Tensor | None, energies: Tensor, rank: int
) -> bool:
    """Whether a product in float32 saves time on A = U^T W and costs less than 1e-7 of the squared
    error of ``rank``.

    A sum of m terms, partial sums of which grow like a random walk's, is rounded by some
    2^-25.5 ||w_c|| in channel c; with A's best for its B an error in A counts by its square alone.
    """
    if len(weights) > 1 or weights[0].dtype != torch.float32 or moment is None:
        return False
    if weights[0].numel() * rank < SMALLEST_DOUBLE:
        return False
    squares = torch.mv(weights[0].square(), moment.diagonal().float())  # by W's rows
    rounding = rank * 2.0**-51 * float(squares.sum(dtype=torch.float64))
    return rounding <= 1e-7 * float(energies[rank:].sum())


def quadratic(weight: Tensor, moment: Tensor) -> Tensor:
    """W H W^T, (m, m), for W (m, n) and a symmetric H (n, n), at little more than half the cost."""
    half = multiply(times_lower(weight, moment), weight.T)
    return half + half.T


def squared_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """||W X||^2 = tr W H W^T, for W (m, n) and H = X X^T (n, n)."""
    if weight.shape[0] > weight.shape[1]:
        return (gram(weight) * moment).sum()
    return 2 * (times_lower(weight, moment) * weight).sum()


def eigen_descending(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """All eigenvalues (descending, not negative) and ``count`` leading eigenvectors (None: all)
    of a symmetric matrix.

    Signs are fixed, so that reruns agree.
    """
    values, vectors = eigh(matrix, count)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    largest = vectors.abs().argmax(dim=0)
    vectors *= torch.sign(vectors[largest, torch.arange(vectors.shape[1])])
    return values, vectors


@dataclass(frozen=True)
class Fit:
    """What nested factors do on the calibration tokens, by rank; shapes (r,).

    Attributes:
        errors: ||(W - B_k A_k) X||_F / ||W X||_F of the stacked layers; entry k - 1 is rank k's.
        squares: sums over the tokens of the squares of A x, row by row of A.
    """

    errors: Tensor
    squares: Tensor


def fit_of_optimum(found: Decomposition) -> Fit:
    """The fit of factors whose energies are those of (W - B_k A_k) X: no product is needed.

    Component i of the outputs has the energy ||b_i||^2 a_i H a_i^T.
    """
    rank, energies = found.a.shape[0], found.energies
    rest = energies.flip(0).cumsum(0).flip(0)  # summed from the small end
    after = torch.cat([rest[1:], rest.new_zeros(1)])[:rank]
    total = rest[0].clamp_min(torch.finfo(rest.dtype).tiny)
    norms = found.b.double().square().sum(dim=0)
    squares = torch.where(norms > 0, energies[:rank] / norms, 0.0)
    return Fit((after / total).sqrt(), squares)


def fit(
    weights: Sequence[Tensor], decomposition: Decomposition, input_moment: Tensor | None
) -> Fit:
    """The fit of any nested factors; without H, X = I.

    With H = X X^T the squared error is tr W H W^T - 2 sum_i (A H W^T B)_ii + sum_ij (A H A^T)_ij
    (B^T B)_ij over i, j <= k, so that cumulative sums give all ranks at once.
    """
    a = decomposition.a.double()
    a_h = a if input_moment is None else a @ input_moment.double()
    kept = a.shape[0]
    squares = (a_h * a).sum(dim=1)
    total, cross = torch.zeros((), dtype=torch.float64), torch.zeros(kept, dtype=torch.float64)
    b_b = torch.zeros((kept, kept), dtype=torch.float64)
    at = 0
    for part in _row_blocks(weights):
        rows, b = part.double(), decomposition.b[at : at + len(part)].double()
        at += len(part)
        if input_moment is None:
            total += rows.square().sum()
        else:
            total += squared_norm(rows, input_moment.double())
        cross += ((rows @ a_h.T) * b).sum(dim=0)
        add_upper(b_b, b)
    if float(total) <= 0.0:
        return Fit(torch.zeros(kept, dtype=torch.float64), squares)
    mirror(b_b)
    inside = ((a_h @ a.T) * b_b).cumsum(0).cumsum(1).diagonal()
    errors = ((total - 2 * cross.cumsum(0) + inside).clamp_min(0.0) / total).sqrt()
    return Fit(errors, squares)


def energies_of(weight: Tensor, a: Tensor, b: Tensor, moment: Tensor) -> Tensor:
    """What each rank takes off ||(W - B_k A_k) X||_F^2, and last what remains; shape (r + 1,).

    For factors that no singular value decomposition made: entries are differences of the errors,
    not negative, and the sum of those after the k-th is the error of rank k.
    """
    found = Decomposition(a, b, torch.zeros(0), 0.0)
    total = float(squared_norm(weight.double(), moment.double()))
    errors = fit([weight], found, moment).errors.square() * total
    steps = torch.cat([torch.tensor([total], dtype=torch.float64), errors])
    # an error that rises by rounding is held at the lowest one so far
    steps = torch.cummin(steps, dim=0).values
    return torch.cat([steps[:-1] - steps[1:], steps[-1:]])


def orthonormal_in(a: Tensor, moment: Tensor) -> Tensor:
    """Rows with A H A^T = I, row i a combination of A's rows up to i alone."""
    root, _ = damped_cholesky(a @ moment @ a.T, 0.0)
    basis: Tensor = torch.linalg.solve_triangular(root, a, upper=False)
    return basis
