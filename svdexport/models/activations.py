"""Activations of the calibration samples at the boundaries of blocks, in a scratch file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """Hidden states (samples, length, width) in float32, one such array for each boundary.

    The file may be larger than the memory. It is read and written rather than mapped, so that a
    full disk is an error that can be caught.
    """

    def __init__(self, path: Path, samples: int, length: int, width: int) -> None:
        self._path = path
        self._shape = (length, width)
        self._sample = length * width * 4
        self._boundary = samples * self._sample
        self._file = path.open("w+b")

    def put(self, boundary: int, part: slice, hidden: Tensor) -> None:
        self._file.seek(boundary * self._boundary + part.start * self._sample)
        self._file.write(hidden.detach().float().contiguous().numpy().data.cast("B"))

    def get(self, boundary: int, part: slice, samples: int) -> Tensor:
        """(samples, length, width), float32."""
        self._file.seek(boundary * self._boundary + part.start * self._sample)
        data = bytearray(samples * self._sample)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=torch.float32).view(samples, *self._shape)

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
