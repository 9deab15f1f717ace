"""The processes of one run, on one machine or several, over torch.distributed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from svdexport.errors import ResourceError

STOP = "stop"


class Ranks:
    """This process among those of a run; by itself it is rank 0 of 1 and nothing is sent.

    Rank 0 leads: it writes all files and tells the others when to work (``order``). They wait
    (``await_order``) until they are dismissed. A collective call raises ResourceError on all
    ranks that are left where one has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self._waiting = size > 1  # whether the others wait for an order

    def order(self, what: dict[str, Any]) -> None:
        """Rank 0: set the others to work."""
        if self.size > 1:
            self._broadcast_json(what)
            self._waiting = False

    def finished(self) -> None:
        """Rank 0: the others have done what they were told and wait again."""
        self._waiting = self.size > 1

    def dismiss(self) -> None:
        """Rank 0: let the others end, if they wait; a second call does nothing."""
        if self.rank == 0 and self._waiting:
            self._waiting = False
            self._broadcast_json({"do": STOP})

    def await_order(self) -> dict[str, Any]:
        """The others: what rank 0 wants next."""
        return self._broadcast_json({})

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; the same bits for the same number of ranks."""
        if self.size > 1:
            with _peers():
                torch.distributed.all_reduce(values)
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values, on every rank; all give a tensor of that shape and type."""
        if self.size > 1:
            with _peers():
                torch.distributed.broadcast(values, src=0)
        return values

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the tensors of all ranks, as safetensors in between; elsewhere nothing."""
        if self.size == 1:
            return tensors
        from safetensors.torch import load, save

        with _peers():
            if self.rank:
                data = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
                torch.distributed.send(torch.tensor([data.numel()]), dst=0)
                torch.distributed.send(data, dst=0)
                return {}
            found = dict(tensors)
            for other in range(1, self.size):
                size = torch.zeros(1, dtype=torch.int64)
                torch.distributed.recv(size, src=other)
                data = torch.empty(int(size), dtype=torch.uint8)
                torch.distributed.recv(data, src=other)
                found |= load(data.numpy().tobytes())
            return found

    def _broadcast_json(self, what: dict[str, Any]) -> dict[str, Any]:
        data = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
        size = self.broadcast(torch.tensor([data.numel()]))
        if self.rank:
            data = torch.zeros(int(size), dtype=torch.uint8)
        told: dict[str, Any] = json.loads(self.broadcast(data).numpy().tobytes())
        return told


ALONE = Ranks()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A connection that breaks means that another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ResourceError(
            f"another process of this run has ended, so this one stops ({reason}); run the same "
            f"command again: it goes on from the last finished block"
        ) from error
