"""The MatMulNBits grid of onnxruntime: quantise, pack, unpack. NumPy in, NumPy out.

A weight W (rows = outputs, columns = inputs) is cut along its columns into blocks of
``block_size``; each block has one float32 scale and one zero point, and a value is
``(q - zero) * scale`` with ``q`` an unsigned integer of ``bits`` bits. Symmetric grids fix the
zero point at ``2**(bits - 1)`` and do not store it. Source: onnxruntime,
``docs/ContribOperators.md``, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from svdexport.core.grids import Scales, Steps

BITS = (2, 4, 8)
"""Bit widths that the CPU kernels of onnxruntime 1.31 take."""

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class NBitsGrid:
    """Parameters of a grid. Raises ValueError where onnxruntime has no such kernel."""

    bits: int
    block_size: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, not {self.bits}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block size must be one of {BLOCK_SIZES}, not {self.block_size}")

    @property
    def zero(self) -> int:
        """The implied zero point of the symmetric grid."""
        return int(1 << (self.bits - 1))

    @property
    def name(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        return f"nbits-{self.bits}-{self.block_size}-{kind}"

    @property
    def levels(self) -> int:
        return int(1 << self.bits)

    def blocks(self, columns: int) -> int:
        """Blocks per row; the last one is padded."""
        return -(-columns // self.block_size)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and (asymmetric) zero points of a (rows, columns) weight."""
        blocks = self.blocks(columns)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return int(rows * (blocks * self.block_size * self.bits // 8 + 4 * blocks + zeros))

    @property
    def block(self) -> int:
        """Columns whose parameters are stored together: those of a block."""
        return self.block_size

    def search(self, values: Tensor, weights: Tensor) -> Scales:
        """``scale`` and ``zero`` (rows, blocks) of small weighted squared error, for GPTQ."""
        from svdexport.core.grids_search import affine_scale_and_zero, symmetric_scale

        blocks = values.float().reshape(values.shape[0], -1, self.block_size)
        weight = weights.float().reshape(1, -1, self.block_size)
        if self.symmetric:
            scale = symmetric_scale(blocks, weight, -self.zero, self.levels - 1 - self.zero)
            return {"scale": scale}
        scale, zero = affine_scale_and_zero(blocks, weight, self.levels - 1)
        return {"scale": scale, "zero": zero}

    def steps(self, scales: Scales) -> Steps:
        """The effective parameters of what :meth:`search` found."""
        import torch

        from svdexport.core.grids import Steps

        scale = scales["scale"]
        zero = scales.get("zero", torch.full_like(scale, float(self.zero)))
        return Steps(
            scale, torch.zeros_like(scale), zero.float(), self.block_size, 0, self.levels - 1
        )


@dataclass(frozen=True)
class NBitsTensor:
    """A quantised weight, not yet packed.

    Attributes:
        codes: uint8 (rows, blocks, block_size), each below 2**bits; padding holds the zero point.
        scales: float32 (rows, blocks).
        zeros: uint8 (rows, blocks); constant on a symmetric grid.
        columns: true number of columns, without padding.
        grid: the grid.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    columns: int
    grid: NBitsGrid

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), without padding."""
        return self.codes.shape[0], self.columns


@dataclass(frozen=True)
class PackedNBits:
    """The initialisers of a MatMulNBits node.

    Attributes:
        weight: uint8 (rows, blocks, block_size * bits / 8), low bits first.
        scales: float32 (rows, blocks).
        zeros: uint8 (rows, ceil(blocks * bits / 8)), or None on a symmetric grid.
    """

    weight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


def quantize(weight: np.ndarray, grid: NBitsGrid) -> NBitsTensor:
    """Round W (rows, columns) to the nearest point of the grid.

    Symmetric: the value of largest magnitude of a block maps to the end of the range that has one
    point more (code 0), so the scale carries a sign. Asymmetric: zero and both ends of the block
    are points of the grid, up to the rounding of the zero point. No clipping is searched for: on
    SmolLM2-135M at 4 bits, scales of least squared error gave a larger KL divergence than these.
    Raises ValueError for values that are not finite.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight has two dimensions, not {weight.ndim}")
    if not np.isfinite(weight).all():
        raise ValueError("a weight with NaN or infinite values cannot be quantised")
    rows, columns = weight.shape
    blocks = grid.blocks(columns)
    padded = np.zeros((rows, blocks * grid.block_size), np.float32)
    padded[:, :columns] = weight
    values = padded.reshape(rows, blocks, grid.block_size)
    codes = np.empty(values.shape, np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8)
    step = max(1, (1 << 22) // max(1, blocks * grid.block_size))
    for start in range(0, rows, step):  # bounded scratch memory for a vocabulary-sized weight
        part = slice(start, start + step)
        codes[part], scales[part], zeros[part] = _quantize_rows(values[part], grid)
    _pad_with_zero_point(codes, zeros, columns)
    return NBitsTensor(codes, scales, zeros, columns, grid)


def _quantize_rows(
    values: np.ndarray, grid: NBitsGrid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale, zero = _symmetric(values, grid) if grid.symmetric else _asymmetric(values, grid)
    safe = np.where(scale == 0, np.float32(1), scale)
    code = np.rint(values / safe[..., None]) + zero[..., None]
    return np.clip(code, 0, grid.levels - 1).astype(np.uint8), scale, zero


def _symmetric(values: np.ndarray, grid: NBitsGrid) -> tuple[np.ndarray, np.ndarray]:
    top = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    scale = (top / np.float32(-grid.zero)).astype(np.float32)
    return scale, np.full(scale.shape, grid.zero, np.uint8)


def _asymmetric(values: np.ndarray, grid: NBitsGrid) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum(values.min(axis=-1), 0.0)
    high = np.maximum(values.max(axis=-1), 0.0)
    scale = ((high - low) / np.float32(grid.levels - 1)).astype(np.float32)
    safe = np.where(scale == 0, np.float32(1), scale)
    zero = np.clip(np.rint(-low / safe), 0, grid.levels - 1).astype(np.uint8)
    return scale, zero


def _values(code: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    difference = code.astype(np.float32) - zero[..., None].astype(np.float32)
    return np.asarray(difference * scale[..., None], np.float32)


def _pad_with_zero_point(codes: np.ndarray, zeros: np.ndarray, columns: int) -> None:
    rest = columns % codes.shape[-1]
    if rest:
        codes[:, -1, rest:] = zeros[:, -1, None]


def from_codes(codes: Tensor, scales: Scales, columns: int, grid: NBitsGrid) -> NBitsTensor:
    """A weight quantised elsewhere: codes (rows, blocks * block_size), padding included."""
    scale = np.ascontiguousarray(scales["scale"].numpy(), np.float32)
    zeros = np.full(scale.shape, grid.zero, np.uint8)
    if "zero" in scales:
        zeros = scales["zero"].numpy().astype(np.uint8)
    blocks = codes.numpy().reshape(len(scale), -1, grid.block_size).copy()
    _pad_with_zero_point(blocks, zeros, columns)
    return NBitsTensor(blocks, scale, zeros, columns, grid)


def dequantize(tensor: NBitsTensor) -> np.ndarray:
    """Float32 (rows, columns): what the runtime computes with."""
    values = _values(tensor.codes, tensor.scales, tensor.zeros)
    return np.ascontiguousarray(values.reshape(values.shape[0], -1)[:, : tensor.columns])


def pack(tensor: NBitsTensor) -> PackedNBits:
    """The bytes of a MatMulNBits node's initialisers."""
    grid = tensor.grid
    zeros = None if grid.symmetric else pack_bits(tensor.zeros, grid.bits)
    return PackedNBits(pack_bits(tensor.codes, grid.bits), tensor.scales, zeros)


def unpack(packed: PackedNBits, columns: int, grid: NBitsGrid) -> NBitsTensor:
    """The inverse of :func:`pack` for a weight of ``columns`` columns."""
    codes = unpack_bits(packed.weight, grid.bits)
    if packed.zeros is None:
        zeros = np.full(packed.scales.shape, grid.zero, np.uint8)
    else:
        zeros = unpack_bits(packed.zeros, grid.bits)[:, : grid.blocks(columns)]
    return NBitsTensor(codes, packed.scales, zeros, columns, grid)


def signed(tensor: NBitsTensor) -> tuple[np.ndarray, np.ndarray]:
    """What DequantizeLinear (ONNX, opset 21) takes on axis 0, of a weight on a symmetric grid.

    Returns: codes, int8 (columns, rows), between -2**(bits - 1) and 2**(bits - 1) - 1; and scales,
    float32 (blocks, rows). The last block of a column may be shorter than the others.
    Raises ValueError for an asymmetric grid.
    """
    if not tensor.grid.symmetric:
        raise ValueError("only symmetric grids have signed codes")
    rows = tensor.codes.shape[0]
    flat = tensor.codes.reshape(rows, -1)[:, : tensor.columns].astype(np.int16) - tensor.grid.zero
    return np.ascontiguousarray(flat.T.astype(np.int8)), np.ascontiguousarray(tensor.scales.T)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., n) of ``bits`` bits each into bytes (..., ceil(n * bits / 8)), low bits first."""
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(codes, np.uint8)
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(grouped.shape[:-1], np.uint8)
    for index in range(per_byte):
        packed |= (grouped[..., index] << (index * bits)).astype(np.uint8)
    return packed


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes (..., n) into codes (..., n * 8 / bits)."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    mask = np.uint8((1 << bits) - 1)
    parts = [(packed >> (index * bits)) & mask for index in range(per_byte)]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)
