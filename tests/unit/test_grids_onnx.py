from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from svdexport.core.grids_onnx import (
    NBitsGrid,
    NBitsTensor,
    dequantize,
    pack,
    pack_bits,
    quantize,
    unpack,
    unpack_bits,
)

grids = st.builds(
    NBitsGrid,
    bits=st.sampled_from([2, 4, 8]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 200))


def random_weight(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def runtime_values(tensor: NBitsTensor) -> np.ndarray:
    """The weight as onnxruntime reads it: a MatMulNBits node applied to the identity."""
    packed, grid = pack(tensor), tensor.grid
    rows, columns = tensor.codes.shape[0], tensor.columns
    arrays = {"w": packed.weight, "s": packed.scales}
    if packed.zeros is not None:
        arrays["z"] = packed.zeros
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=grid.bits,
        block_size=grid.block_size,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]).T


@settings(max_examples=40, deadline=None)
@given(grid=grids, shape=shapes, seed=st.integers(0, 1000))
def test_onnxruntime_reads_the_values_we_meant(
    grid: NBitsGrid, shape: tuple[int, int], seed: int
) -> None:
    tensor = quantize(random_weight(shape, seed), grid)
    assert np.array_equal(runtime_values(tensor), dequantize(tensor))


@settings(max_examples=60, deadline=None)
@given(grid=grids, shape=shapes, seed=st.integers(0, 1000))
def test_packing_is_undone_by_unpacking(grid: NBitsGrid, shape: tuple[int, int], seed: int) -> None:
    tensor = quantize(random_weight(shape, seed), grid)
    packed = pack(tensor)
    back = unpack(packed, shape[1], grid)
    assert np.array_equal(back.codes, tensor.codes)
    assert np.array_equal(back.zeros, tensor.zeros)
    arrays = [packed.weight, packed.scales] + ([] if grid.symmetric else [packed.zeros])
    assert sum(array.nbytes for array in arrays if array is not None) == grid.nbytes(*shape)


@settings(max_examples=60, deadline=None)
@given(grid=grids, shape=shapes, seed=st.integers(0, 1000))
def test_every_value_gets_the_nearest_point_of_its_block(
    grid: NBitsGrid, shape: tuple[int, int], seed: int
) -> None:
    weight = random_weight(shape, seed)
    tensor = quantize(weight, grid)
    found = dequantize(tensor)
    steps = np.repeat(np.abs(tensor.scales), grid.block_size, axis=1)[:, : shape[1]]
    # Half a step from rounding; the end that has one point less, or the rounded zero, costs more.
    assert (np.abs(found - weight) <= steps * 1.001 + 1e-6).all()
    levels = np.arange(grid.levels) - tensor.zeros[..., None].astype(np.float64)
    points = levels * tensor.scales[..., None]
    for column in range(shape[1]):
        own = points[:, column // grid.block_size]
        best = np.abs(own - weight[:, column, None]).min(axis=1)
        gap = np.abs(found[:, column] - weight[:, column])
        assert (gap <= best * (1 + 1e-5) + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(grid=grids, shape=shapes, seed=st.integers(0, 1000))
def test_the_points_span_the_values_of_a_block(
    grid: NBitsGrid, shape: tuple[int, int], seed: int
) -> None:
    weight = random_weight(shape, seed)
    tensor = quantize(weight, grid)
    for block, start in enumerate(range(0, shape[1], grid.block_size)):
        values = weight[:, start : start + grid.block_size]
        scales, zeros = tensor.scales[:, block], tensor.zeros[:, block]
        if grid.symmetric:  # the largest value is the end that has one point more
            peak = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)[:, 0]
            assert np.allclose(scales * -(grid.levels // 2), peak, rtol=1e-6)
            assert (zeros == grid.levels // 2).all()
        else:  # zero is a point, and the ends are but for its rounding; padding is zero too
            low, high = values.min(axis=1).clip(max=0), values.max(axis=1).clip(min=0)
            assert np.allclose(scales * (grid.levels - 1), high - low, rtol=1e-6)
            assert (np.abs(zeros + low / scales) <= 0.5 + 1e-4).all()


@settings(max_examples=40, deadline=None)
@given(grid=grids.filter(lambda grid: grid.symmetric), shape=shapes, seed=st.integers(0, 1000))
def test_points_of_the_grid_stay_where_they_are(
    grid: NBitsGrid, shape: tuple[int, int], seed: int
) -> None:
    """Not so on asymmetric grids: a block's range may shrink by the rounded zero point."""
    once = dequantize(quantize(random_weight(shape, seed), grid))
    assert np.allclose(dequantize(quantize(once, grid)), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_large_weight_are_rounded_each_by_itself(symmetric: bool) -> None:
    """A weight of more than 2^22 values is worked on in parts."""
    weight, grid = random_weight((9, 1 << 19), 1), NBitsGrid(4, 32, symmetric)
    whole = quantize(weight, grid)
    for row in range(9):
        alone = quantize(weight[row : row + 1], grid)
        assert np.array_equal(whole.codes[row], alone.codes[0])
        assert np.array_equal(whole.scales[row], alone.scales[0])
        assert np.array_equal(whole.zeros[row], alone.zeros[0])


@given(bits=st.sampled_from([2, 4, 8]), count=st.integers(1, 40), seed=st.integers(0, 100))
def test_bits_go_low_first(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert np.array_equal(unpack_bits(packed, bits)[:, :count], codes)
    assert packed[0, 0] & ((1 << bits) - 1) == codes[0, 0]


def test_zeros_and_constants_are_exact() -> None:
    grid = NBitsGrid(4, 32)
    assert not dequantize(quantize(np.zeros((2, 40), np.float32), grid)).any()
    constant = np.full((2, 40), -0.75, np.float32)
    assert np.array_equal(dequantize(quantize(constant, grid)), constant)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        NBitsGrid(3)
    with pytest.raises(ValueError, match="block size"):
        NBitsGrid(4, 48)
    with pytest.raises(ValueError, match="NaN"):
        quantize(np.array([[np.nan]], np.float32), NBitsGrid(8))
    with pytest.raises(ValueError, match="two dimensions"):
        quantize(np.zeros(4, np.float32), NBitsGrid(8))
