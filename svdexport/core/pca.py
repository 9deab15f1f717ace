"""Principal directions of data that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from svdexport.core.decompose import eigen_descending


class IncrementalPca:
    """The leading left singular vectors of all rows seen, with at most ``count`` of them kept.

    Each part is merged with what is kept, [V s, Y^T], and truncated again (Ross et al., 2008,
    without the mean: outputs are approximated, not their deviations). Exact while nothing is
    truncated; float64.
    """

    def __init__(self, size: int, count: int) -> None:
        self.count = count
        self.directions = torch.zeros((size, 0), dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)
        self.total = 0.0

    def add(self, rows: Tensor) -> None:
        """Merge a part: rows y of shape (rows, size)."""
        y = rows.double()
        self.total += float(y.square().sum())
        joined = torch.cat([self.directions * self.squares.sqrt(), y.T], dim=1)
        size, columns = joined.shape
        if size <= columns:
            values, vectors = eigen_descending(joined @ joined.T)
        else:
            values, right = eigen_descending(joined.T @ joined)
            kept = int((values > 1e-12 * values[0].clamp_min(1e-300)).sum())
            vectors = joined @ (right[:, :kept] / values[:kept].sqrt())
        self.directions = vectors[:, : self.count].contiguous()
        self.squares = values[: self.directions.shape[1]]

    def energies(self) -> Tensor:
        """Energy along each direction, and last what lies along none of them."""
        rest = max(0.0, self.total - float(self.squares.sum()))
        return torch.cat([self.squares, torch.tensor([rest], dtype=torch.float64)])
