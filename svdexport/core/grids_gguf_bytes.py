"""The bytes of ggml's quantised blocks: codes and stored scales in, uint8 out, and back.

A block is given as codes (N, block) and scales; layouts are those of ``block_q*`` in ggml-common.h
(llama.cpp). NumPy throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Fields = dict[str, np.ndarray]
"""d, dmin: float16 (N,). scale, minimum: uint8 or int8 (N, parts)."""

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """How one type stands in bytes; ``pack`` and ``unpack`` are inverse to each other."""

    pack: Callable[[Array, Fields], Array]
    unpack: Callable[[Array], tuple[Array, Fields]]


def _half(values: Array) -> Array:
    return np.ascontiguousarray(values, dtype="<f2").reshape(-1, 1).view(np.uint8)


def _read_half(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view("<f2")[:, 0]


def _interleave(codes: Array, lane: int, bits: int) -> Array:
    """Byte i of a run of ``lane`` bytes holds the codes i, i + lane, ..., low bits first."""
    per_byte = 8 // bits
    runs = codes.reshape(len(codes), -1, per_byte, lane)
    out = np.zeros((len(codes), runs.shape[1], lane), np.uint8)
    for index in range(per_byte):
        out |= (runs[:, :, index] << (index * bits)).astype(np.uint8)
    return out.reshape(len(codes), -1)


def _spread(raw: Array, lane: int, bits: int) -> Array:
    """The inverse of :func:`_interleave`."""
    per_byte = 8 // bits
    runs = raw.reshape(len(raw), -1, 1, lane)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, per_byte, 1)
    mask = np.uint8((1 << bits) - 1)
    return ((runs >> shifts) & mask).reshape(len(raw), -1)


def _split(raw: Array, *sizes: int) -> list[Array]:
    return np.split(raw, np.cumsum(sizes)[:-1], axis=1)


def _pack_q8_0(codes: Array, fields: Fields) -> Array:
    return np.hstack([_half(fields["d"]), codes ^ np.uint8(128)])  # the sign bit of code - 128


def _unpack_q8_0(raw: Array) -> tuple[Array, Fields]:
    d, codes = _split(raw, 2, 32)
    return codes ^ np.uint8(128), {"d": _read_half(d)}


def _pack_q4_0(codes: Array, fields: Fields) -> Array:
    return np.hstack([_half(fields["d"]), _interleave(codes, 16, 4)])


def _unpack_q4_0(raw: Array) -> tuple[Array, Fields]:
    d, codes = _split(raw, 2, 16)
    return _spread(codes, 16, 4), {"d": _read_half(d)}


def _fifth_bits(codes: Array) -> Array:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _pack_q5(codes: Array, fields: Fields) -> Array:
    offset = [_half(fields["dmin"])] if "dmin" in fields else []
    low = _interleave(codes & np.uint8(15), 16, 4)
    return np.hstack([_half(fields["d"]), *offset, _fifth_bits(codes), low])


def _unpack_q5(raw: Array) -> tuple[Array, Fields]:
    head = raw.shape[1] - 20
    scales, high, low = _split(raw, head, 4, 16)
    bits = np.unpackbits(high, axis=1, bitorder="little")
    fields = {"d": _read_half(scales[:, :2])}
    if head == 4:
        fields["dmin"] = _read_half(scales[:, 2:])
    return _spread(low, 16, 4) | (bits << 4).astype(np.uint8), fields


def _pack_q2_k(codes: Array, fields: Fields) -> Array:
    scales = fields["scale"] | (fields["minimum"] << 4).astype(np.uint8)
    tail = (_half(fields["d"]), _half(fields["dmin"]))
    return np.hstack([scales, _interleave(codes, 32, 2), *tail])


def _unpack_q2_k(raw: Array) -> tuple[Array, Fields]:
    scales, codes, d, dmin = _split(raw, 16, 64, 2, 2)
    fields = {"d": _read_half(d), "dmin": _read_half(dmin)}
    return _spread(codes, 32, 2), fields | {"scale": scales & 15, "minimum": scales >> 4}


def _pack_q3_k(codes: Array, fields: Fields) -> Array:
    scale = (fields["scale"].astype(np.int16) + 32).astype(np.uint8)
    low = (scale[:, :8] & 15) | ((scale[:, 8:] & 15) << 4).astype(np.uint8)
    high = _interleave(scale >> 4, 4, 2)
    mask = _interleave(codes >> 2, 32, 1)
    return np.hstack([mask, _interleave(codes & 3, 32, 2), low, high, _half(fields["d"])])


def _unpack_q3_k(raw: Array) -> tuple[Array, Fields]:
    mask, codes, low, high, d = _split(raw, 32, 64, 8, 4, 2)
    scale = np.hstack([low & 15, low >> 4]) | (_spread(high, 4, 2) << 4).astype(np.uint8)
    values = _spread(codes, 32, 2) | (_spread(mask, 32, 1) << 2).astype(np.uint8)
    return values, {"d": _read_half(d), "scale": (scale.astype(np.int16) - 32).astype(np.int8)}


def _pack_six_bits(scale: Array, minimum: Array) -> Array:
    """Eight 6-bit scales and minima in 12 bytes."""
    first = (scale[:, :4] | ((scale[:, 4:] & 0x30) << 2)).astype(np.uint8)
    second = (minimum[:, :4] | ((minimum[:, 4:] & 0x30) << 2)).astype(np.uint8)
    third = ((scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)).astype(np.uint8)
    return np.hstack([first, second, third])


def _unpack_six_bits(raw: Array) -> Fields:
    first, second, third = _split(raw, 4, 4, 4)
    scale = np.hstack([first & 63, (third & 15) | ((first >> 2) & 0x30)])
    minimum = np.hstack([second & 63, (third >> 4) | ((second >> 2) & 0x30)])
    return {"scale": scale, "minimum": minimum}


def _k_head(fields: Fields) -> list[Array]:
    scales = _pack_six_bits(fields["scale"], fields["minimum"])
    return [_half(fields["d"]), _half(fields["dmin"]), scales]


def _pack_q4_k(codes: Array, fields: Fields) -> Array:
    return np.hstack([*_k_head(fields), _interleave(codes, 32, 4)])


def _unpack_q4_k(raw: Array) -> tuple[Array, Fields]:
    d, dmin, scales, codes = _split(raw, 2, 2, 12, 128)
    fields = {"d": _read_half(d), "dmin": _read_half(dmin)}
    return _spread(codes, 32, 4), fields | _unpack_six_bits(scales)


def _pack_q5_k(codes: Array, fields: Fields) -> Array:
    high = _interleave(codes >> 4, 32, 1)
    return np.hstack([*_k_head(fields), high, _interleave(codes & 15, 32, 4)])


def _unpack_q5_k(raw: Array) -> tuple[Array, Fields]:
    d, dmin, scales, high, low = _split(raw, 2, 2, 12, 32, 128)
    fields = {"d": _read_half(d), "dmin": _read_half(dmin)}
    codes = _spread(low, 32, 4) | (_spread(high, 32, 1) << 4).astype(np.uint8)
    return codes, fields | _unpack_six_bits(scales)


def _pack_q6_k(codes: Array, fields: Fields) -> Array:
    scales = fields["scale"].view(np.uint8)
    low, high = _interleave(codes & 15, 64, 4), _interleave(codes >> 4, 32, 2)
    return np.hstack([low, high, scales, _half(fields["d"])])


def _unpack_q6_k(raw: Array) -> tuple[Array, Fields]:
    low, high, scales, d = _split(raw, 128, 64, 16, 2)
    codes = _spread(low, 64, 4) | (_spread(high, 32, 2) << 4).astype(np.uint8)
    scale = np.ascontiguousarray(scales).view(np.int8)
    return codes, {"d": _read_half(d), "scale": scale}


LAYOUTS: dict[str, Layout] = {
    "Q8_0": Layout(_pack_q8_0, _unpack_q8_0),
    "Q5_0": Layout(_pack_q5, _unpack_q5),
    "Q5_1": Layout(_pack_q5, _unpack_q5),
    "Q4_0": Layout(_pack_q4_0, _unpack_q4_0),
    "IQ4_NL": Layout(_pack_q4_0, _unpack_q4_0),
    "Q6_K": Layout(_pack_q6_k, _unpack_q6_k),
    "Q5_K": Layout(_pack_q5_k, _unpack_q5_k),
    "Q4_K": Layout(_pack_q4_k, _unpack_q4_k),
    "Q3_K": Layout(_pack_q3_k, _unpack_q3_k),
    "Q2_K": Layout(_pack_q2_k, _unpack_q2_k),
}
