"""What a refiner is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdexport.core.moments import Moment

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Moments(Protocol):
    """Second moments of one block's linears in the dense model, by the linear's name."""

    @property
    def inputs(self) -> Mapping[str, Moment]: ...

    @property
    def gradients(self) -> Mapping[str, Moment]:
        """Of the outputs' gradients; empty where the method of the recipe has not used them."""
        ...


class Decoder(Protocol):
    """A decoder that can be run part by part; hidden states are (batch, tokens, width)."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def blocks(self) -> Sequence[str]:
        """Module paths of the blocks."""
        ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block, (batch, tokens) -> hidden."""
        ...

    def block(self, index: int, hidden: Tensor) -> Tensor:
        """Output of a block, for hidden states of the shape that was embedded last."""
        ...

    def hidden(self, tokens: Tensor) -> Tensor:
        """Output of the last block."""
        ...

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Everything after the blocks."""
        ...

    def weights(self, linears: Sequence[str]) -> list[Tensor]:
        """(m, n) each, of linears that are dense in this model."""
        ...


@dataclass(frozen=True)
class RefineData:
    """What every refiner works on.

    Attributes:
        student: the compressed model in float32; a refiner may change its weights.
        teacher: loads the dense model; called where it is needed.
        moments: calibrates the dense model; blocks come in any order.
        groups: leader -> linears that share its A, the leader among them.
        tokens: windows of text, (windows, length), int64.
        scratch: a folder of the refiner's own that outlives a killed run.
        where: the recipe's key of this refiner, for errors.
    """

    student: Decoder
    teacher: Callable[[], Decoder]
    moments: Callable[[], Iterator[Moments]]
    groups: dict[str, list[str]]
    tokens: Tensor
    scratch: Path
    progress: Progress
    where: str = "refine"


@dataclass(frozen=True)
class Refined:
    """Changed tensors of the checkpoint, by name (float32, on the CPU), and what to tell people."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Refiner:
    """A refiner: its name in recipes, where it comes from, and the function that does it.

    ``refine(data, config)`` takes the section of the recipe of the same name.
    """

    name: str
    title: str
    source: str
    refine: Callable[[RefineData, Any], Refined]
