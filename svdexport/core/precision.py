"""The precision of a model's own products: bfloat16 where the processor multiplies in it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from svdexport.core.products import float32_products
from svdexport.recipe.values import Precision

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


CPU = torch.device("cpu")


def choose(precision: Precision, device: torch.device = CPU) -> torch.dtype:
    """The dtype for ``auto``: what the hardware says, not a stopwatch, so that reruns agree."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    ask = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.8 and later
    found: dict[str, Any] = ask() if device.type == "cpu" else {}
    has = any(found.get(name) for name in BF16_CAPABILITIES)
    return torch.bfloat16 if has else torch.float32


def in_full() -> contextlib.AbstractContextManager[Any]:
    """Products as their operands are, also where ``products_in`` is at work around it."""
    return torch.autocast(CPU.type, enabled=False)


def products_in(
    dtype: torch.dtype, device: torch.device = CPU
) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in ``dtype``; weights, norms and the residual stream stay float32."""
    if dtype == torch.float32:
        return float32_products() if device.type == "cpu" else contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
