"""Refiners: what makes pairs better once they are there. One file here and one line in REFINERS."""

from __future__ import annotations

from svdexport.refine import als, distill, lora, sequential_ls
from svdexport.refine.base import Decoder, Refined, RefineData, Refiner

REFINERS: dict[str, Refiner] = {
    refiner.name: refiner
    for refiner in (als.REFINER, sequential_ls.REFINER, lora.REFINER, distill.REFINER)
}

__all__ = ["REFINERS", "Decoder", "RefineData", "Refined", "Refiner"]
