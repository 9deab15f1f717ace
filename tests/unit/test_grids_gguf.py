from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdexport.core.grids_gguf import GRIDS
from svdexport.runtimes.ggml import quantize as ggml_quantize

TYPES = sorted(GRIDS)


def read(name: str, packed: torch.Tensor) -> np.ndarray:
    """Independent reader: gguf-py."""
    return np.asarray(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_read_as_gguf_reads_them_and_pack_again(name: str) -> None:
    grid = GRIDS[name]
    raw = np.random.default_rng(1).integers(0, 256, (5, 3 * grid.block_bytes), dtype=np.uint8)
    if name == "Q8_0":
        raw[raw == 128] = 0  # -128 is not among the codes that the grid uses
    blocks = raw.reshape(-1, grid.block_bytes)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        name, (0, 2)[: 1 + grid.affine]
    ):
        halves = np.random.default_rng(at).standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    packed = torch.from_numpy(raw)
    codes, scales = grid.unpack(packed)
    np.testing.assert_array_equal(grid.steps(scales).values(codes).numpy(), read(name, packed))
    assert torch.equal(grid.pack(codes, scales), packed)


@pytest.mark.parametrize("name", TYPES)
@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    kind=st.sampled_from(["normal", "zeros", "huge", "denormal", "constant", "positive"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_extremes_round_trip_and_stay_near(
    name: str, rows: int, blocks: int, kind: str, seed: int
) -> None:
    grid = GRIDS[name]
    weight = random_weight(rows, blocks * grid.block, seed)
    if kind == "zeros":
        weight.zero_()
    elif kind == "huge":
        weight[0, seed % grid.block] = 3e4
    elif kind == "denormal":
        weight *= 1e-42
    elif kind == "constant":
        weight.fill_(-0.7)
    elif kind == "positive":
        weight = weight.abs() + 0.5
    scales = grid.search(weight, torch.ones(weight.shape[1]))
    steps = grid.steps(scales)
    codes = steps.codes(weight)
    packed = grid.pack(codes, scales)
    np.testing.assert_array_equal(read(name, packed), steps.values(codes).numpy())
    error = (steps.values(codes) - weight).norm()
    assert error <= weight.norm() + 1e-6
    if kind == "zeros":
        assert error == 0.0
    if kind == "constant":
        assert error <= 0.02 * weight.norm()
    if kind == "huge":
        assert (steps.values(codes)[0, seed % grid.block] - 3e4).abs() < 0.1 * 3e4


@pytest.mark.parametrize("name", TYPES)
def test_search_is_not_worse_than_ggml_with_the_same_importance(name: str) -> None:
    weight = random_weight(64, 512)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 2 + 0.01
    grid = GRIDS[name]
    scales = grid.search(weight, importance)
    steps = grid.steps(scales)
    ours = steps.values(steps.codes(weight))
    theirs = read(name, torch.from_numpy(ggml_quantize(weight.numpy(), name, importance.numpy())))

    def error(values: torch.Tensor) -> float:
        return float(((values - weight).square() * importance).sum())

    assert error(ours) <= 1.002 * error(torch.from_numpy(theirs))


@pytest.mark.parametrize("heavy", [0.0, 100.0])
@pytest.mark.parametrize(
    # a half-precision scale rounds by up to 0.05 %, the integer scales of parts by more
    ("name", "most"),
    [("Q5_1", 0.0005), ("Q2_K", 0.0005), ("Q4_K", 0.013), ("Q5_K", 0.006)],
)
def test_constant_positive_rows_of_uneven_importance_are_met(
    name: str, most: float, heavy: float
) -> None:
    weight = random_weight(300, 1).exp().expand(300, 512).contiguous()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 2 + 0.01
    if heavy:
        importance[::32] = heavy
    steps = GRIDS[name].steps(GRIDS[name].search(weight, importance))
    assert float((steps.values(steps.codes(weight)) / weight - 1.0).abs().max()) <= most


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_what_no_scale_holds_is_refused(name: str, bad: float) -> None:
    weight = random_weight(2, 256)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match=r"NaN|past half precision"):
        GRIDS[name].search(weight, torch.ones(256))


@pytest.mark.parametrize(
    ("name", "most"),
    [("Q4_0", 0.2), ("Q5_1", 0.057), ("Q2_K", 0.49), ("Q4_K", 0.117), ("Q5_K", 0.057)],
)
def test_columns_without_importance_still_get_a_scale(name: str, most: float) -> None:
    weight = random_weight(3, 256)
    grid = GRIDS[name]
    steps = grid.steps(grid.search(weight, torch.zeros(256)))
    assert (steps.values(steps.codes(weight)) - weight).norm() < most * weight.norm()


@pytest.mark.parametrize("name", [name for name in TYPES if GRIDS[name].affine])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_part_without_importance_is_stored_as_well_as_ggml_stores_it(
    name: str, scale: float
) -> None:
    weight, grid = random_weight(64, 512, 1), GRIDS[name]
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 2 + 0.01
    importance[32:64] = 0.0
    weight[:, 32:64] *= scale
    steps = grid.steps(grid.search(weight, importance))
    ours = steps.values(steps.codes(weight))
    theirs = read(name, torch.from_numpy(ggml_quantize(weight.numpy(), name, importance.numpy())))
    part = slice(32, 64)
    found, known = ((values - weight.numpy())[:, part] for values in (ours.numpy(), theirs))
    assert np.linalg.norm(found) <= 1.002 * np.linalg.norm(known)
