"""How long a run will take and how much memory it needs: estimates, from shapes alone.

The counts of operations are those of the algorithms' leading terms; the rates are measured here
within half a second. Right within a factor of two or three on a machine that does nothing else.
"""

from __future__ import annotations

import time

import torch

from svdexport.core.moments import NEED_GRADIENTS
from svdexport.models.blocks import InputGroup
from svdexport.models.shapes import Shapes
from svdexport.pipeline.factors import statistics
from svdexport.recipe import Recipe

BYTES_F32, BYTES_F64 = 4, 8
# An eigenproblem with vectors takes some 9 n^3 operations, at a quarter of a product's rate
# (tridiagonalisation is bound by memory); two of them and the products around make about 50 n^3.
EIGEN_OPERATIONS = 50.0
SELF_BATCH_SHARE = 0.25  # of a product's rate, for the thin products of batched writing


def memory_bytes(recipe: Recipe, shapes: Shapes) -> dict[str, int]:
    """Peak by part: weights in float32, the moments of one block, and activations on disk."""
    needs = statistics(recipe)
    structure = shapes.structure
    moments = 0
    for group in structure.of_block(0):
        if needs:
            moments += group.members[0].in_features ** 2 * BYTES_F64
        outputs = sum(member.out_features**2 for member in group.members) * BYTES_F64
        moments += outputs * len(needs & {"gradients", "sampled_gradients"})
        if "fisher" in needs:
            moments += sum(member.params for member in group.members) * BYTES_F64
    width = structure.of_block(0)[0].members[0].in_features
    boundaries = len(structure.blocks) + 1 if NEED_GRADIENTS & needs else 1
    boundaries += "sampled_gradients" in needs
    return {
        "weights": shapes.count * BYTES_F32,
        "moments_of_a_block": moments,
        "activations": tokens(recipe) * width * BYTES_F32 * boundaries if needs else 0,
    }


def tokens(recipe: Recipe) -> int:
    """Tokens of calibration."""
    return recipe.calibration.samples * recipe.calibration.length


def seconds(recipe: Recipe, shapes: Shapes, groups: list[InputGroup]) -> dict[str, float]:
    """Seconds by stage, with all threads of torch, on this machine."""
    single, double = rate(torch.float32), rate(torch.float64)
    needs = statistics(recipe)
    linears = sum(linear.params for linear in shapes.structure.linears())
    count = tokens(recipe)
    found = {"text": 0.0, "calibrate": 0.0}
    if recipe.calibration.source == "self":
        written = count + recipe.evaluate.windows * recipe.evaluate.context
        found["text"] = 2.0 * shapes.count * written / (SELF_BATCH_SHARE * single)
    if needs:
        # forward twice (activations, then recomputed with gradients) and backward
        passes = 2.0 + (6.0 if NEED_GRADIENTS & needs else 0.0)
        passes += 2.0 if "sampled_gradients" in needs else 0.0  # backward once more
        found["calibrate"] = passes * linears * count / single
        found["calibrate"] += 2.0 * count * _moment_sizes(groups, "gradients" in needs) / double
    work = sum(_eigen_size(group) ** 3 for group in groups)
    found["factorize"] = EIGEN_OPERATIONS * work / double
    metrics = len(recipe.speed.prefill) + 1
    longest = max(*recipe.speed.prefill, recipe.speed.decode)
    a_call = max(0.2, 2.0 * shapes.count * longest / single)
    found["measure"] = len(recipe.export) * metrics * (recipe.speed.rounds + 2) * 2 * a_call
    return {stage: round(value, 1) for stage, value in found.items()}


def _moment_sizes(groups: list[InputGroup], gradients: bool) -> float:
    size = float(sum(group.members[0].in_features ** 2 for group in groups))
    if gradients:
        size += sum(m.out_features**2 for group in groups for m in group.members)
    return size


def _eigen_size(group: InputGroup) -> int:
    rows = sum(member.out_features for member in group.members)
    return max(group.members[0].in_features, min(rows, 2 * group.members[0].in_features))


def rate(dtype: torch.dtype, size: int = 512) -> float:
    """Operations a second of a square product on this machine now."""
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.05:
        a @ a
        done += 1
    return done * 2.0 * size**3 / (time.perf_counter() - began)
