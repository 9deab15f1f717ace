"""What the gauge of a pair does to its quantisation error, by type, on layers of a real model.

    python tools/benchmarks/gauge.py MODEL --text calibration.txt --blocks 5 15 25 [--json OUT]

Pairs of ``kfac_svd`` (grouped) at a kept share of the linears' parameters, of rank 256 at least
where that is below break-even, as K-quants need it, are rounded by ggml's own quantiser, with the
importance matrix of the calibration, in each gauge, and run as llama.cpp does it: x and A x rounded
to 8 bits in blocks of 32, or of 256 for K-quants. The figure is ||y - y'||^2 / ||y||^2 of the
pair's outputs over inputs of the calibration text, in geometric mean over the pairs; ``8 bits`` are
exact factors with rounded activations.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from svdexport.core.decompose import decompose
from svdexport.core.gauge import balance, evened, mixed
from svdexport.core.lowrank import break_even_rank
from svdexport.models.blocks import select
from svdexport.models.calibrate import calibrate
from svdexport.models.loader import load_model, structure_of
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import BLOCKS, to_float32

Gauge = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
TYPES = ("8 bits", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
EXACT = "8 bits"


def mean_squares(a: Tensor, moment: Tensor) -> Tensor:
    return ((a.double() @ moment) * a.double()).sum(dim=1)


def one_norm(a: Tensor, b: Tensor, _moment: Tensor) -> tuple[Tensor, Tensor]:
    """B's columns at norm 1."""
    norm = b.norm(dim=0).clamp_min(1e-30)
    return a * norm[:, None], b / norm


def white(a: Tensor, b: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A x of unit mean square in every component."""
    d = mean_squares(a, moment).clamp_min(1e-60).rsqrt().float()
    return a * d[:, None], b / d


def even(a: Tensor, b: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    return evened(a, b, mean_squares(a, moment))


def rotated(size: int, hadamard: bool) -> Gauge:
    """The even gauge, then an orthogonal rotation of every ``size`` neighbouring components."""

    def gauge(a: Tensor, b: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        a, b = even(a, b, moment)
        turn = torch.block_diag(
            *[_turn(min(size, len(a) - at), hadamard) for at in range(0, len(a), size)]
        )
        return turn @ a, b @ turn.T

    return gauge


def _turn(size: int, hadamard: bool) -> Tensor:
    if hadamard and size & (size - 1) == 0:
        turn = torch.ones(1, 1)
        while len(turn) < size:
            turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
        return turn / math.sqrt(size)
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q


GAUGES: dict[str, Gauge] = {
    "as made": lambda a, b, _: (a, b),
    "B's columns alike": one_norm,
    "A x alike": white,
    "balanced (A A^T = B^T B)": lambda a, b, _: balance(a, b),
    "even": even,
    "even, shuffled": lambda a, b, h: _shuffled(*even(a, b, h)),
    "even, Hadamard of 32": rotated(32, True),
    "even, Hadamard of 256": rotated(256, True),
    "even, random rotation of 256": rotated(256, False),
    "even, mixed": lambda a, b, h: mixed(*even(a, b, h)),
}


def _shuffled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    return a[order], b[:, order]


def eight_bits(x: Tensor, block: int) -> Tensor:
    """Rows rounded as llama.cpp rounds activations: codes to 127 with one scale a block."""
    size = block if x.shape[1] % block == 0 else 32
    parts = x.reshape(len(x), -1, size)
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return ((parts / scale).round() * scale).reshape(x.shape)


def held(type_name: str, weight: Tensor, importance: Tensor) -> Tensor:
    """What ggml's quantiser leaves of a weight; of 8 bits where rows do not fill its blocks."""
    if type_name == EXACT:
        return weight
    if weight.shape[1] % BLOCKS[type_name][0]:
        type_name = "Q8_0"
    weights = (importance / importance.mean()).clamp_min(1e-4).float().numpy()
    packed = quantize(weight.float().contiguous().numpy(), type_name, weights)
    return torch.from_numpy(to_float32(packed, type_name).copy())


def error(a: Tensor, b: Tensor, rows: Tensor, moment: Tensor, type_name: str) -> float:
    block = 256 if type_name.endswith("_K") else 32
    a_held = held(type_name, a, moment.diagonal())
    b_held = held(type_name, b, mean_squares(a, moment))
    inner = eight_bits(rows, block) @ a_held.T
    got = eight_bits(inner, block) @ b_held.T
    exact = (rows @ a.T) @ b.T
    return float((got - exact).square().sum() / exact.square().sum())


def pairs(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Leader, A, B, input rows and their moment of every group of the blocks asked for."""
    from transformers import AutoTokenizer

    model, structure = load_model(options.model), structure_of(options.model)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text).input_ids)
    count = options.samples * options.length
    samples = tokens[:count].reshape(options.samples, options.length)
    groups = select(structure, ("re:.*",), ("lm_head",), True)
    with tempfile.TemporaryDirectory() as scratch:
        found = calibrate(
            model,
            structure,
            samples,
            batch=1,
            scratch=Path(scratch),
            keep_rows=options.rows,
            statistics=frozenset({"inputs", "gradients", "rows"}),
            skip=set(range(len(structure.blocks))) - set(options.blocks),
        )
        for moments in found:
            for group in groups:
                if group.block != moments.block:
                    continue
                names = [member.name for member in group.members]
                weights = [model.get_submodule(name).weight.detach() for name in names]
                rows = sum(map(len, weights))
                limit = break_even_rank(rows, weights[0].shape[1])
                rank = max(256, int(options.ratio * limit) // 32 * 32)
                if rank > limit:
                    rank = max(32, limit // 64 * 32)
                h = moments.inputs[names[0]].matrix
                gradients = [moments.gradients[name].matrix for name in names]
                pair = decompose(weights, h, gradients, max_rank=rank).pair(rank)
                yield group.leader, pair.a, pair.b, moments.rows[names[0]], h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs: dict[tuple[str, str], list[float]] = {}
    for leader, a, b, rows, moment in pairs(options):
        print(f"{leader}: rank {len(a)}", flush=True)
        for name, gauge in GAUGES.items():
            turned = gauge(a, b, moment)
            for type_name in TYPES:
                found = error(*turned, rows, moment, type_name)
                logs.setdefault((name, type_name), []).append(math.log(max(found, 1e-30)))
    table = {
        name: {t: math.exp(sum(logs[name, t]) / len(logs[name, t])) for t in TYPES}
        for name in GAUGES
    }
    print("| gauge | " + " | ".join(TYPES) + " |\n|" + "---|" * (len(TYPES) + 1))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[t]:.2e}" for t in TYPES) + " |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
