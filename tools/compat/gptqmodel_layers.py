"""svdexport's GPTQ beside gptqmodel's, on one layer: same groups, same damping, 2 and 4 bits.

gptqmodel pins what svdexport does not, so it has an environment of its own:

    python -m venv .gptqmodel && .gptqmodel/bin/pip install gptqmodel . 'pillow>=12'
    GPTQMODEL_CPU_WORKERS=2 .gptqmodel/bin/python tools/compat/gptqmodel_layers.py

A random W and correlated inputs; the figure is tr(R H R^T) / tr(W H W^T). ``same scales`` gives
svdexport's rounding the scales by which gptqmodel chooses (smallest and largest value of a group
when its turn comes), from left to right and without sweeps: the two are then the same algorithm and
must agree within 2 %, or this exits with 1. ``own`` is svdexport with its own search and defaults.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from torch import Tensor, nn

from svdexport.core.gptq import GptqConfig, gptq, relative_error
from svdexport.core.grids import Scales, Steps
from svdexport.core.grids_onnx import NBitsGrid

DAMPING = 0.01
WITHIN = 0.02


@dataclass(frozen=True)
class RangeGrid:
    """Groups whose scale and zero point come from their smallest and largest value."""

    bits: int
    block: int
    symmetric: bool

    def search(self, values: Tensor, weights: Tensor) -> Scales:
        del weights
        top = 2**self.bits - 1
        groups = values.reshape(len(values), -1, self.block)
        low, high = groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = torch.where(low < 0, -high, low)
        scale = (high - low) / top
        zero = (-low / scale).round()
        if self.symmetric:
            zero = torch.full_like(scale, (top + 1) / 2)
        return {"scale": scale, "zero": zero}

    def steps(self, scales: Scales) -> Steps:
        scale = scales["scale"]
        return Steps(
            scale, torch.zeros_like(scale), scales["zero"], self.block, 0, 2**self.bits - 1
        )


def example(m: int, n: int, tokens: int) -> tuple[Tensor, Tensor]:
    """W (m, n) and inputs (tokens, n) with correlations and a few loud channels."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=generator) * torch.arange(1, n + 1) ** -0.5
    inputs = torch.randn(tokens, n, generator=generator) @ mix.T
    inputs[:, ::97] *= 8
    return torch.randn(m, n, generator=generator) / n**0.5, inputs


def theirs(weight: Tensor, inputs: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    config = QuantizeConfig(
        bits=bits,
        group_size=group,
        sym=symmetric,
        desc_act=False,
        act_group_aware=False,
        damp_percent=DAMPING,
    )
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    for rows in inputs.split(512):
        task.add_batch(rows[None], layer(rows)[None])
    values: Tensor = task.quantize(blocksize=group)[0]  # or scales wait for blocks of 128
    return values.detach().float()


def main() -> None:
    torch.set_num_threads(1)
    weight, inputs = example(384, 512, 4096)
    moment = (inputs.T @ inputs).double()
    print("| bits | group | zero point | gptqmodel | same scales | ratio | own |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for bits in (4, 2):
        for group in (128, 32):
            for symmetric in (False, True):
                grid = RangeGrid(bits, group, symmetric)
                same = gptq(weight, moment, grid, GptqConfig(DAMPING, "natural", 0)).error
                own = gptq(weight, moment, NBitsGrid(bits, group, symmetric), GptqConfig()).error
                found = theirs(weight, inputs, bits, group, symmetric)
                reference = relative_error(weight, found, moment)
                worst = max(worst, abs(same / reference - 1))
                kind = "fixed" if symmetric else "its own"
                print(
                    f"| {bits} | {group} | {kind} | {reference:.4e} | {same:.4e} "
                    f"| {same / reference:.3f} | {own:.4e} |",
                    flush=True,
                )
    print(f"same scales: within {worst:.1%}")
    sys.exit(0 if worst <= WITHIN else 1)


if __name__ == "__main__":
    main()
