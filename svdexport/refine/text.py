"""The windows that a training reads, in which order, and what the dense model makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svdexport.errors import RecipeError
from svdexport.files import fsync
from svdexport.refine.base import Decoder

MAX_HELD_OUT = 16
HELD_OUT_SHARE = 16  # one window of so many


def split(tokens: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows held out, the latter spread evenly over the text.

    Raises RecipeError where there are fewer than two windows.
    """
    count = tokens.shape[0]
    if count < 2:
        raise RecipeError(
            f"{where}: {count} window of text cannot be split into training and held-out text; "
            f"give more calibration.samples"
        )
    held = min(MAX_HELD_OUT, max(1, count // HELD_OUT_SHARE))
    out = torch.zeros(count, dtype=torch.bool)
    out[[(2 * i + 1) * count // (2 * held) for i in range(held)]] = True
    return tokens[~out], tokens[out]


def batch_of(step: int, windows: int, batch: int, seed: int) -> list[int]:
    """Indices of a step's windows: each pass over the text in an order of its own.

    A function of its arguments alone, so that a resumed training needs no state of a generator.
    """
    found: list[int] = []
    order: Tensor | None = None
    epoch = -1
    for position in range(step * batch, (step + 1) * batch):
        if order is None or position // windows != epoch:
            epoch = position // windows
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(windows, generator=generator)
        found.append(int(order[position % windows]))
    return found


class TeacherStates:
    """The dense model's last hidden states, made once a window and then read from a file.

    They stand in float32 (4 bytes x tokens x width); the head turns them into logits again, at a
    fifth of what the whole dense model costs. A second file says which windows are there. Both are
    read and written rather than mapped, so that a full disk is an error that can be caught.

    Args:
        teacher: loads the dense model; not called where every window is in the file.
        make: runs a decoder without gradients: (decoder, tokens) -> hidden.
    """

    def __init__(
        self,
        tokens: Tensor,
        teacher: Callable[[], Decoder],
        make: Callable[[Decoder, Tensor], Tensor],
        path: Path,
        width: int,
    ) -> None:
        self.tokens, self._load, self._make = tokens, teacher, make
        self._teacher: Decoder | None = None
        count, length = tokens.shape
        self._shape, self._window = (length, width), 4 * length * width
        self._states, self._marks = path, path.with_suffix(".known")
        sizes = {self._marks: count, self._states: count * self._window}
        if any(not p.exists() or p.stat().st_size != size for p, size in sizes.items()):
            for part in sizes:  # both are emptied first: a kill in between is seen by their sizes
                part.write_bytes(b"")
            for part, size in sizes.items():
                os.truncate(part, size)
        self._known = np.frombuffer(bytearray(self._marks.read_bytes()), np.uint8)

    def __getitem__(self, windows: list[int]) -> Tensor:
        """(windows, length, width), on the CPU."""
        missing = [i for i in dict.fromkeys(windows) if not self._known[i]]
        if missing:
            if self._teacher is None:
                self._teacher = self._load()
            self._add(missing, self._teacher)
        if self._teacher is not None and self._known.all():
            self._teacher = None
        found = np.empty((len(windows), *self._shape), np.float32)
        with self._states.open("rb") as file:
            for place, i in enumerate(windows):
                file.seek(i * self._window)
                file.readinto(found[place])
        return torch.from_numpy(found)

    def _add(self, windows: list[int], teacher: Decoder) -> None:
        """Make windows' states; they are known once all of them are on the disk."""
        with self._states.open("r+b") as file:
            for i in windows:
                made = self._make(teacher, self.tokens[i : i + 1])[0].float().cpu()
                file.seek(i * self._window)
                file.write(made.contiguous().numpy().data.cast("B"))
        fsync(self._states)
        self._known[windows] = 1
        with self._marks.open("r+b") as file:
            file.write(self._known.tobytes())
