"""Weights for the quantisation error, from the calibration: llama.cpp's importance matrix.

The run leaves ``importance.safetensors`` in the exports' scratch folder: for each linear
``<linear>.inputs`` (n_in,), the mean square of every input channel (the diagonal of its second
moment), and for each leader of a pair ``<leader>.rank`` (k,), the same for A x. The rounding error
of a weight then counts as much as it moves the output. Types that take no weights ignore them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdexport.export.gguf_match import Match

FILE_NAME = "importance.safetensors"
FLOOR = 1e-4  # of the mean: a channel that calibration never used still keeps its weights


@dataclass(frozen=True)
class Importance:
    """Weights by the names of the file above, and by tensors of the GGUF."""

    values: dict[str, np.ndarray]
    linears: dict[str, str]  # tensor of the GGUF -> linear that it holds

    def of_first(self, leader: str) -> np.ndarray | None:
        """(n_in,) for A: the inputs of its group."""
        return self.values.get(f"{leader}.inputs")

    def of_second(self, leader: str, rank: int) -> np.ndarray | None:
        """(k,) for B: A x. Factors are nested, so the first k of a larger rank's are its own."""
        found = self.values.get(f"{leader}.rank")
        return None if found is None or len(found) < rank else found[:rank]

    def of_tensor(self, tensor: str) -> np.ndarray | None:
        """(n_in,) for a dense tensor of the GGUF."""
        linear = self.linears.get(tensor)
        return None if linear is None else self.values.get(f"{linear}.inputs")


NO_IMPORTANCE = Importance({}, {})


def read_importance(work: Path | None, matches: dict[str, Match]) -> Importance:
    """The run's weights, floored; empty without a folder or where the run left none."""
    if work is None or not (work / FILE_NAME).exists():
        return NO_IMPORTANCE
    from safetensors.numpy import load_file

    values = {}
    for name, found in load_file(work / FILE_NAME).items():
        weights = found.astype(np.float32)
        mean = float(weights.mean())
        if np.isfinite(mean) and mean > 0:
            values[name] = np.maximum(weights / mean, FLOOR)
    linears = {
        match.tensor: name.removesuffix(".weight")
        for name, match in matches.items()
        if match.expert is None
    }
    return Importance(values, linears)
