"""Does a written file compute what it should? Its runtime's logits against torch's.

Torch holds the values read back from the file (by an independent reader), so rounding of weights
takes no part: what is left is the arithmetic of the runtime, and mistakes. A wrong row
permutation, a swapped layer or a bias that was left out changes the logits by far more than any
arithmetic does.

How much 8-bit activations change logits depends on the model: 1 % for a sound one, over 20 % for
one that compression has nearly broken; in half precision it is 0.1 % and 3.5 %. So torch is asked
as well: `rounded_activations` rounds the input of every linear as the runtimes do. The runtime's
own rounding falls elsewhere and its logits are not nearer to these than to the exact ones (rounding
errors grow apart within a few layers), but the size of the difference is the same, and the limits
follow it.

A model that is nearly destroyed turns that rounding into logits unrelated to the exact ones. No
limit could tell that from a mistake (`drowned`): the runtime is asked for products in float32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svdexport.core.linears import is_linear
from svdexport.core.measures import Parity
from svdexport.errors import InputError

# What torch shows for rounded activations is within 15 % of what llama.cpp shows on SmolLM2's files
# (0.035 and 0.035 for Q8_0, 0.041 and 0.038 for Q4_0, 0.23 and 0.20 for damaging pairs), the worst
# position within 45 %; twice as much is a mistake, not arithmetic.
_NOISE_FACTOR = 2.0
_WORST_FACTOR = 3.0
# Beyond this no limit can tell arithmetic from a mistake: unrelated logits differ by about 1.4.
_MAX_RELATIVE = 0.6
_MIN_TOP1 = 0.3

Array = NDArray[np.float64]
Logits = NDArray[np.float32]
Rounding = Callable[[torch.Tensor], torch.Tensor]

POSITIONS = 96  # tokens compared: enough for two digits of agreement, a second of work


@dataclass(frozen=True)
class Tolerance:
    """Limits of a comparison.

    `relative`: root mean square difference over the standard deviation of the reference's logits.
    `worst`: the same for the worst single position. `top1`: least share of equal top tokens.
    """

    relative: float
    worst: float
    top1: float


# Each limit is two to three times what SmolLM2-135M's files show, dense and as plain SVD pairs (a
# model so damaged that it amplifies every rounding), on 128 tokens of English. Where the runtime
# rounds activations these are the least limits: a model that feels it more is given wider ones.
# float32 on both sides: sums in another order, exponentials by polynomials. Seen: 0.0001.
FLOAT32 = Tolerance(relative=0.002, worst=0.01, top1=0.98)
# Weights in half precision, and llama.cpp rounds activations to half before it multiplies; with
# float32 weights its cache of keys and values is still in half. Seen: 0.001 to 0.009.
FLOAT16 = Tolerance(relative=0.02, worst=0.06, top1=0.95)
# bfloat16 keeps 8 bits of every activation and every sum.
BFLOAT16 = Tolerance(relative=0.08, worst=0.24, top1=0.9)
# llama.cpp (Q8_0 and Q8_K blocks) and MatMulNBits at accuracy_level 4 round activations to 8 bits,
# a scale for each block of 32 or so: 0.4 % of the block's largest value in every product. Seen:
# 0.036 for the dense model, 0.23 for the damaged one: give `compare` the `rounded` logits.
INT8_ACTIVATIONS = Tolerance(relative=0.08, worst=0.24, top1=0.88)

TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("checkpoint", "float32"): FLOAT32,
    ("checkpoint", "float16"): FLOAT16,
    ("checkpoint", "bfloat16"): BFLOAT16,
    ("gguf", "F32"): FLOAT16,
    ("gguf", "F16"): FLOAT16,
    ("gguf", "BF16"): BFLOAT16,
    ("onnx", "fp32"): FLOAT32,
    ("onnx", "fp16"): FLOAT16,
}


def tolerance(format_name: str, type_name: str) -> Tolerance:
    """The limits for a format and type; a quantised type that is not listed has 8-bit inputs."""
    if format_name == "gguf":
        type_name = _coarsest(type_name)
    return TOLERANCES.get((format_name, type_name), INT8_ACTIVATIONS)


def _types(label: str) -> dict[str, str]:
    """Weight types by role, of a GGUF's label such as ``Q4_0-a-F16-stock``."""
    first, *parts = label.split("-")
    roles = ("a", "b", "embedding", "head")
    named = {role: kind for role, kind in itertools.pairwise(parts) if role in roles}
    return {"linear": first} | named


def _coarsest(label: str) -> str:
    """The float type that rounds most, of a GGUF's label; none where a type is quantised."""
    kinds = set(_types(label).values())
    floats = [kind for kind in ("BF16", "F16", "F32") if kind in kinds]
    return floats[0] if set(floats) == kinds else ""


def rounding(format_name: str, type_name: str, block_size: int = 32) -> Rounding | None:
    """How the runtime of such a file rounds the inputs of its linears, None where it does not.

    llama.cpp rounds them to the type of F16 and BF16 weights. 256 share an 8-bit scale in its Q8_K,
    which goes with K-quants, and 32 in its Q8_0; MatMulNBits takes the weights' ``block_size``.
    """
    if format_name == "gguf" and _coarsest(type_name) in ("F16", "BF16"):
        dtype = torch.float16 if _coarsest(type_name) == "F16" else torch.bfloat16
        return lambda values: values.to(dtype).to(values.dtype)
    if tolerance(format_name, type_name) is not INT8_ACTIVATIONS:
        return None
    if format_name == "gguf":
        types = _types(type_name)
        products = [types["linear"], types.get("a", ""), types.get("b", "")]
        block_size = 256 if any("_K" in t or t == "mixed" for t in products) else 32
    return functools.partial(round_blocks, block=block_size)


@contextmanager
def rounded_activations(model: Any, rounding: Rounding) -> Iterator[None]:
    """Within this context the input of every linear of a torch model is rounded."""

    def hook(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    linears = [module for module in model.modules() if is_linear(module)]
    handles = [module.register_forward_pre_hook(hook) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """8 bits with a scale (largest magnitude / 127) for each ``block`` numbers, as ggml's Q8_0."""
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % block))
    blocks = padded.reshape(*padded.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.round(blocks / torch.where(scale > 0, scale, torch.ones_like(scale)))
    rounded = (steps * scale).reshape(padded.shape)
    return rounded[..., :width]


@dataclass(frozen=True)
class _Difference:
    relative: float
    worst: float
    worst_at: int
    top1: float
    largest: float
    mean: float


def _difference(expected: Array, found: Array, spread: float) -> _Difference:
    gap = np.abs(found - expected)
    by_position = np.sqrt((gap**2).mean(axis=1)) / spread
    return _Difference(
        relative=float(np.sqrt((by_position**2).mean())),
        worst=float(by_position.max()),
        worst_at=int(by_position.argmax()),
        top1=float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        largest=float(gap.max()),
        mean=float(gap.mean()),
    )


def drowned(reference: Logits, rounded: Logits | None) -> bool:
    """Whether rounding activations alone may change logits (T, V) beyond any limit."""
    if rounded is None:
        return False
    expected = reference.astype(np.float64)
    noise = _difference(expected, rounded.astype(np.float64), float(expected.std()))
    return _NOISE_FACTOR * noise.relative > _MAX_RELATIVE


def compare(
    reference: Logits,
    logits: Logits,
    limits: Tolerance,
    rounded: Logits | None = None,
    exact: bool = False,
) -> Parity:
    """Compare logits (T, V) of a runtime with the reference's for the same tokens.

    `rounded` are the reference's logits under `rounded_activations`, for files whose runtime
    rounds activations: the limits are then this model's own, and not below those of half
    precision, or below `limits` where these are of 16-bit activations. With `exact` the runtime
    multiplied in float32, and the limits are those of float32.
    Raises InputError where the shapes differ, or the reference is not finite or constant.
    """
    if reference.shape != logits.shape or reference.ndim != 2 or not reference.size:
        raise InputError(f"logits of shape {logits.shape} against {reference.shape}")
    expected = reference.astype(np.float64)
    spread = float(expected.std())
    if not np.isfinite(spread) or spread == 0.0:
        raise InputError("the reference's logits are not finite, or all equal")
    noise = None
    if rounded is not None and np.isfinite(rounded).all():  # half precision may overflow
        noisy = rounded.astype(np.float64)
        noise = _difference(expected, noisy, spread)
        least = FLOAT16 if limits is INT8_ACTIVATIONS else limits
        limits = FLOAT32 if exact else _by_noise(noise, expected_top1(expected, noisy), least)
    found = logits.astype(np.float64)
    finite = np.asarray(np.isfinite(found).all(axis=1))
    got = _difference(expected, np.where(finite[:, None], found, 0.0), spread)
    return Parity(
        top1_agreement=got.top1,
        max_abs_diff=got.largest,
        mean_abs_diff=got.mean,
        spread=spread,
        relative=got.relative,
        worst_relative=got.worst,
        positions=int(expected.shape[0]),
        min_top1=limits.top1,
        max_relative=limits.relative,
        activation_noise=None if noise is None else noise.relative,
        problems=tuple(_problems(got, finite, limits)),
    )


def expected_top1(reference: Array, noisy: Array) -> float:
    """Share of positions whose top token survives noise of the size that each position shows.

    Of one draw of the noise a handful of 96 positions change their top token, between 2 and 8 for
    four files of one run. The mean over all draws is steadier: with noise s in each of two logits,
    a gap g between the first and the second closes with probability erfc(g / 2s) / 2. What shifts
    all logits of a position alike changes no order and is left out.
    """
    gaps = np.diff(np.partition(reference, -2, axis=1)[:, -2:], axis=1)[:, 0]
    sizes = (noisy - reference).std(axis=1)
    lost = [math.erfc(g / (2 * s)) / 2 if s > 0 else 0.0 for g, s in zip(gaps, sizes, strict=True)]
    return 1.0 - float(np.mean(lost))


def _by_noise(noise: _Difference, top1: float, least: Tolerance) -> Tolerance:
    """Limits from the model's own sensitivity; attention adds what half precision does."""
    return Tolerance(
        relative=min(_MAX_RELATIVE, max(least.relative, _NOISE_FACTOR * noise.relative)),
        worst=max(least.worst, _WORST_FACTOR * noise.worst),
        top1=max(_MIN_TOP1, min(least.top1, 1 - _WORST_FACTOR * (1 - top1))),
    )


def _problems(got: _Difference, finite: NDArray[np.bool_], limits: Tolerance) -> Iterator[str]:
    if not finite.all():
        yield f"logits are not finite, first at position {int(np.flatnonzero(~finite)[0])}"
    if got.relative > limits.relative:
        yield f"relative difference {got.relative:.4f} is over {limits.relative:.4f}"
    if got.worst > limits.worst:
        yield (
            f"relative difference {got.worst:.4f} at position {got.worst_at} is over "
            f"{limits.worst:.4f}"
        )
    if got.top1 < limits.top1:
        yield f"top token agrees at {got.top1:.1%} of positions, less than {limits.top1:.1%}"
