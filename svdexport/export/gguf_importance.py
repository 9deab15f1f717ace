"""Weights for the quantisation error, from the calibration: llama.cpp's importance matrix.

The run leaves ``importance.safetensors`` in the exports' scratch folder: for each linear
``<linear>.inputs`` (n_in,), the mean square of every input channel (the diagonal of its second
moment), and for each leader of a pair ``<leader>.rank`` (k,), the same for A x. The rounding error
of a weight then counts as much as it moves the output. Types that take no weights ignore them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdexport.checkpoint import module_name
from svdexport.export.gguf_match import Match

FILE_NAME = "importance.safetensors"
FLOOR = 1e-4  # of the mean: a channel that calibration never used still keeps its weights


@dataclass(frozen=True)
class Importance:
    """Weights by the names of the file above, and by tensors of the GGUF.

    Of a stack of experts they are (experts, n), or None where one expert has none.
    """

    values: dict[str, np.ndarray]
    linears: dict[str, list[str]]  # tensor of the GGUF -> the linear, or the experts, that it holds

    def of_first(self, leaders: Sequence[str]) -> np.ndarray | None:
        """(n_in,) for A, or of each expert: the inputs of its group."""
        return _together([self.values.get(f"{leader}.inputs") for leader in leaders])

    def of_second(self, leaders: Sequence[str], rank: int) -> np.ndarray | None:
        """(k,) for B: A x. Factors are nested, so the first k of a larger rank's are its own."""
        found = [self.values.get(f"{leader}.rank") for leader in leaders]
        return _together([x[:rank] if x is not None and len(x) >= rank else None for x in found])

    def of_tensor(self, tensor: str) -> np.ndarray | None:
        """(n_in,) for a dense tensor of the GGUF."""
        linears = self.linears.get(tensor, [])
        return _together([self.values.get(f"{linear}.inputs") for linear in linears])


def _together(found: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    return known[0] if len(known) == 1 else np.stack(known)


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
    linears: dict[str, list[str]] = {}
    for name, match in sorted(matches.items(), key=lambda item: item[1].expert or 0):
        linears.setdefault(match.tensor, []).append(module_name(name).removesuffix(".weight"))
    return Importance(values, linears)
