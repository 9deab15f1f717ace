"""Rounding a row to Q8_K, as products with K-quants do first: the bytes of ggml's reference."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import pytest

BLOCK = 256
BYTES = 4 + BLOCK + 2 * BLOCK // 16  # scale, codes, sums of 16 codes
LARGEST = float(np.finfo(np.float32).max)
# below it -127 / x is infinite
SMALLEST_SCALED = np.float32(127 / LARGEST)


def rounded(function: str, row: np.ndarray) -> bytes:
    """What a C function makes of a row; bytes that it leaves alone are 0x55."""
    assert row.dtype == np.float32 and row.size % BLOCK == 0
    row = np.ascontiguousarray(row)
    out = (ctypes.c_uint8 * (row.size // BLOCK * BYTES))(*[0x55] * (row.size // BLOCK * BYTES))
    quantize = llama_cpp.llama_cpp._lib[function]
    quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    quantize.restype = None
    quantize(row.ctypes.data, ctypes.addressof(out), row.size)
    return bytes(out)


def assert_same_bytes(rows: np.ndarray) -> None:
    rows = np.asarray(rows, dtype=np.float32)
    want = rounded("quantize_row_q8_K_ref", rows)
    got = rounded("quantize_row_q8_K", rows)
    shape = (-1, BYTES)
    np.testing.assert_array_equal(
        np.frombuffer(got, np.uint8).reshape(shape), np.frombuffer(want, np.uint8).reshape(shape)
    )


def normal(blocks: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, BLOCK)).astype(np.float32)


def test_bytes_are_a_scale_codes_and_sums() -> None:
    row = normal()[0]
    raw = rounded("quantize_row_q8_K", row)
    scale = np.frombuffer(raw[:4], np.float32)[0]
    codes = np.frombuffer(raw[4 : 4 + BLOCK], np.int8).astype(int)
    sums = np.frombuffer(raw[4 + BLOCK :], np.int16)
    np.testing.assert_array_equal(sums, codes.reshape(-1, 16).sum(1))
    assert np.abs(codes * scale - row).max() <= 0.5001 * abs(scale)


@pytest.mark.parametrize("exponent", [-44, -38, -37, -36, -31, -30, -29, -3, 0, 3, 30, 37])
def test_random_blocks_of_any_size(exponent: int) -> None:
    with np.errstate(over="ignore"):
        assert_same_bytes(normal(500) * np.float32(10.0**exponent))


@pytest.mark.parametrize("largest", [127.0, -127.0])
def test_ties(largest: float) -> None:
    """The scale is 1 or -1, and codes lie between two whole numbers."""
    halves = np.random.default_rng(0).integers(-127, 127, (500, BLOCK)) + 0.5
    halves[:, 7] = largest
    assert_same_bytes(halves)
    steps = np.array([-np.inf, 0, np.inf], np.float32)[np.arange(500 * BLOCK) % 3]
    assert_same_bytes(np.nextafter(halves.ravel().astype(np.float32), steps).reshape(-1, BLOCK))


@pytest.mark.parametrize("places", [(0, 1), (0, 255), (7, 8), (5, 131), (130, 200), (254, 255)])
def test_first_of_equal_magnitudes_gives_the_sign(places: tuple[int, int]) -> None:
    rows = normal(2)
    rows[0, places] = 5, -5
    rows[1, places] = -5, 5
    assert_same_bytes(rows)
    first = np.frombuffer(rounded("quantize_row_q8_K", rows[0])[:4], np.float32)[0]
    assert first == pytest.approx(-5 / 127)


EDGES = {
    "zero": [0.0],
    "zeros of both signs": [0.0, -0.0],
    "denormal": [1e-45, -3e-42, 1e-39],
    "1e-38": [1e-38, -1e-38, 0.0],
    "about the smallest that has a scale": [
        SMALLEST_SCALED,
        np.nextafter(SMALLEST_SCALED, np.float32(0)),
        np.nextafter(SMALLEST_SCALED, np.float32(1)),
    ],
    "the largest": [LARGEST, -LARGEST, 1e38, 1.0],
    "one size": [-0.3],
}


@pytest.mark.parametrize("values", EDGES.values(), ids=EDGES.keys())
def test_edges_of_the_numbers(values: list[float]) -> None:
    chosen = np.array(values, np.float32)
    assert_same_bytes(np.resize(chosen, BLOCK))
    for value in chosen:  # alone, and as the only one that is not zero
        assert_same_bytes(np.full(BLOCK, value))
        assert_same_bytes(np.where(np.arange(BLOCK) == 77, value, np.float32(0)))
    assert_same_bytes(np.random.default_rng(1).choice(chosen, (100, BLOCK)))


NOT_FINITE = {
    "NaN": 0x7FC00000,
    "NaN with a sign": 0xFFC00000,
    "NaN with other bits": 0x7FC00123,
    "signalling NaN": 0x7F800001,
    "infinity": 0x7F800000,
    "minus infinity": 0xFF800000,
}


@pytest.mark.parametrize("bits", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_one_number_that_is_not_finite(bits: int) -> None:
    """At every place of a block, among numbers of common size, among zeros and tiny ones; blocks
    beside it are what they are without it."""
    for others in (normal(3), np.zeros((3, BLOCK), np.float32), normal(3) * np.float32(1e-38)):
        for place in range(BLOCK):
            rows = others.copy()
            rows.view(np.uint32)[1, place] = bits
            assert_same_bytes(rows)
    rows = normal(3)
    rows.view(np.uint32)[1, 9] = bits
    got = rounded("quantize_row_q8_K", rows)
    plain = rounded("quantize_row_q8_K", normal(3))
    assert got[:BYTES] == plain[:BYTES] and got[2 * BYTES :] == plain[2 * BYTES :]


@pytest.mark.parametrize("values", [(np.nan,), (np.inf,), (np.inf, -np.inf), (np.nan, -np.inf, 1)])
def test_many_that_are_not_finite(values: tuple[float, ...]) -> None:
    assert_same_bytes(np.resize(np.array(values, np.float32), BLOCK))
