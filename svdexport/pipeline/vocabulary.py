"""Embedding and head of a file of mixed types: what rounding them costs, and their values.

A head is a linear, and is rounded by GPTQ in the metric of its inputs, the last hidden states. A
table that is embedding and head at once is rounded so too, with more damping: its rows are also
read as they are, where no direction of an error counts less than another. (Measured: the share
below is as good as the gradients' own moment.) An embedding of its own is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdexport.core.gptq import GptqConfig, Quantized, gptq, round_to_nearest
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.noise import relative_noise
from svdexport.errors import InputError
from svdexport.packed import PackedWeight, write_packed
from svdexport.pipeline.quantize_block import packed_parts
from svdexport.recipe import Quantize
from svdexport.runtimes.gguf_file import BLOCKS

PROBE = "Q4_0"
PROBE_SAMPLES = 2
METRIC_SAMPLES = 16  # of the calibration text; the metric has a few hundred columns
TIED_DAMPING = 0.03


def vocabulary(network: Any) -> dict[str, tuple[int, int]]:
    """Embedding and head (once where tied) by module name: rows and columns."""
    names = {id(module): name for name, module in network.named_modules()}
    found: dict[int, str] = {}
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        if module is not None:
            found.setdefault(id(module.weight), names[id(module)])
    return {name: tuple(network.get_submodule(name).weight.shape) for name in found.values()}


@torch.no_grad()
def head_inputs(network: Any, tokens: Tensor) -> Tensor | None:
    """H (n, n), float64: second moment of what the head is given; None without a head."""
    head = network.get_output_embeddings()
    if head is None:
        return None
    width = head.weight.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64)

    def add(_module: Any, args: tuple[Tensor]) -> None:
        x = args[0].reshape(-1, width).double()
        moment.addmm_(x.T, x)

    hook = head.register_forward_pre_hook(add)
    try:
        for sample in tokens[:METRIC_SAMPLES]:
            network(input_ids=sample[None], use_cache=False)
    finally:
        hook.remove()
    return moment


def rounded(
    network: Any, name: str, type_name: str, quantize: Quantize, inputs: Tensor | None
) -> Quantized:
    """One of the matrices of :func:`vocabulary` on a type's grid; ``inputs``: the head's moment."""
    weight = network.get_submodule(name).weight
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    is_head = head is not None and head.weight is weight
    if inputs is None or not is_head or quantize.algorithm == "rtn":
        return round_to_nearest(weight.detach().float(), None, GRIDS[type_name])
    tied = weight is table.weight
    damping = max(quantize.damping, TIED_DAMPING) if tied else quantize.damping
    config = GptqConfig(damping, quantize.order, quantize.sweeps)
    return gptq(weight.detach().float(), inputs, GRIDS[type_name], config)


@torch.no_grad()
def losses(
    network: Any, matrices: Mapping[str, tuple[int, int]], tokens: Tensor, quantize: Quantize
) -> dict[str, float]:
    """Loss of relative noise 1 in each matrix, in the units of the moments.

    Measured at 4 bits on a few samples. The divergence a token is half of tr(G R H R^T) / T^2 with
    sums over T tokens.
    """
    samples = tokens[:PROBE_SAMPLES]
    expected = [_log_probs(network, sample) for sample in samples]
    inputs = head_inputs(network, tokens)
    found = {}
    for name, (_, columns) in matrices.items():
        if columns % BLOCKS[PROBE][0]:
            raise InputError(f"{name}: rows of {columns} fill no block of {PROBE}")
        weight = network.get_submodule(name).weight
        values = rounded(network, name, PROBE, quantize, inputs).values
        kept = weight.data.clone()
        weight.data.copy_(values)
        divergence = 0.0
        for sample, log_p in zip(samples, expected, strict=True):
            log_q = _log_probs(network, sample)
            divergence += float((log_p.exp() * (log_p - log_q)).sum()) / samples.numel()
        weight.data.copy_(kept)
        found[name] = max(divergence, 0.0) * 2 * tokens.numel() ** 2 / relative_noise(PROBE)
    return found


def write(
    network: Any, types: Mapping[str, str], tokens: Tensor, quantize: Quantize, folder: Path
) -> None:
    """Leave the matrices, in the types chosen (by tensor), in a folder of packed weights."""
    inputs = head_inputs(network, tokens)
    packed = {}
    for name in vocabulary(network):
        type_name = types[f"{name}.weight"]
        found = rounded(network, name, type_name, quantize, inputs)
        parts = packed_parts(found, GRIDS[type_name])
        packed[f"{name}.weight"] = PackedWeight(type_name, parts)
    write_packed(folder / "vocabulary.safetensors", packed)


def _log_probs(network: Any, sample: Tensor) -> Tensor:
    logits: Tensor = network(input_ids=sample[None], use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)
