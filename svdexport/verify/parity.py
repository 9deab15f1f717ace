"""Does a written file compute what it should? Its runtime's logits against torch's.

Torch holds the values read back from the file (by an independent reader), so rounding of weights
takes no part: what is left is the arithmetic of the runtime, and mistakes. A wrong row
permutation, a swapped layer or a bias that was left out changes the logits by far more than any
arithmetic does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdexport.core.measures import Parity
from svdexport.errors import InputError

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


# float32 on both sides: sums in another order, exponentials by polynomials.
FLOAT32 = Tolerance(relative=0.002, worst=0.01, top1=0.98)
# Weights in half precision; llama.cpp rounds activations to half as well before it multiplies.
FLOAT16 = Tolerance(relative=0.02, worst=0.06, top1=0.95)
# bfloat16 keeps 8 bits of every activation.
BFLOAT16 = Tolerance(relative=0.08, worst=0.24, top1=0.9)
# llama.cpp (Q8_0 and Q8_K blocks) and MatMulNBits at accuracy_level 4 round activations to 8 bits,
# a scale for each block of 32 or so: about 0.4 % of the block's largest value in every product.
INT8_ACTIVATIONS = Tolerance(relative=0.12, worst=0.36, top1=0.85)

TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("checkpoint", "float32"): FLOAT32,
    ("checkpoint", "float16"): FLOAT16,
    ("checkpoint", "bfloat16"): BFLOAT16,
    ("gguf", "F32"): FLOAT32,
    ("gguf", "F16"): FLOAT16,
    ("gguf", "BF16"): BFLOAT16,
    ("onnx", "fp32"): FLOAT32,
}


def tolerance(format_name: str, type_name: str) -> Tolerance:
    """The limits for a format and type; a quantised type that is not listed has 8-bit inputs."""
    return TOLERANCES.get((format_name, type_name), INT8_ACTIVATIONS)


def compare(
    reference: NDArray[np.float32], logits: NDArray[np.float32], limits: Tolerance
) -> Parity:
    """Compare logits (T, V) of a runtime with the reference's for the same tokens.

    Raises InputError where the shapes differ, or the reference is not finite or constant.
    """
    if reference.shape != logits.shape or reference.ndim != 2 or not reference.size:
        raise InputError(f"logits of shape {logits.shape} against {reference.shape}")
    expected = reference.astype(np.float64)
    spread = float(expected.std())
    if not np.isfinite(spread) or spread == 0.0:
        raise InputError("the reference's logits are not finite, or all equal")
    found = logits.astype(np.float64)
    if not np.isfinite(found).all():
        position = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        found = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        problems = [f"logits are not finite, first at position {position}"]
    else:
        problems = []
    difference = np.abs(found - expected)
    by_position = np.sqrt((difference**2).mean(axis=1)) / spread
    relative = float(np.sqrt((by_position**2).mean()))
    top1 = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    if relative > limits.relative:
        problems.append(f"relative difference {relative:.4f} is over {limits.relative}")
    if by_position.max() > limits.worst:
        at = int(by_position.argmax())
        problems.append(
            f"relative difference {by_position[at]:.4f} at position {at} is over {limits.worst}"
        )
    if top1 < limits.top1:
        problems.append(f"top token agrees at {top1:.1%} of positions, less than {limits.top1:.0%}")
    return Parity(
        top1_agreement=top1,
        max_abs_diff=float(difference.max()),
        mean_abs_diff=float(difference.mean()),
        spread=spread,
        relative=relative,
        worst_relative=float(by_position.max()),
        positions=int(expected.shape[0]),
        min_top1=limits.top1,
        max_relative=limits.relative,
        problems=tuple(problems),
    )
