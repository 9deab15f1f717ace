"""The weights of one block onto the grids of one export: pairs, and linears that stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from svdexport.checkpoint import Checkpoint
from svdexport.core.gptq import GptqConfig, Quantized, gptq, gptq_pair, round_to_nearest
from svdexport.core.grids import Grid
from svdexport.core.grids_gguf import GRIDS, GgufGrid
from svdexport.core.grids_onnx import NBitsGrid, from_codes, pack
from svdexport.core.lowrank import FactorPair
from svdexport.core.residual import fit_residual
from svdexport.export.gguf_types import Types, held
from svdexport.export.onnx import linear_grid
from svdexport.models.blocks import InputGroup
from svdexport.models.weights import Weights
from svdexport.packed import GGUF_PART, PackedWeight
from svdexport.recipe import Export, GgufExport, OnnxExport, Quantize

ROUNDS = 2  # of a base and its pair in turn


class BlockQuantizer:
    """Quantises one block's groups for one export.

    Attributes:
        packed: what the file is to hold, by tensor. found: what came of every product, by name.
        values: by linear, the dense matrix (m, n) that the file stands for.
        residual: by linear that gets a pair beside its quantised matrix, whose A it uses and the
            rank. leaders: the first of these, for linears that have it.
    """

    def __init__(
        self,
        weights: Weights,
        checkpoint: Checkpoint,
        spec: Export,
        quantize: Quantize,
        types: dict[str, str],
        residual: Mapping[str, tuple[str, int]],
    ) -> None:
        self.weights, self.checkpoint = weights, checkpoint
        self.spec, self.quantize, self.types = spec, quantize, types
        self.residual = residual
        self.leaders: dict[str, str] = {}
        self.packed: dict[str, PackedWeight] = {}
        self.found: list[tuple[str, Quantized]] = []
        self.values: dict[str, Tensor] = {}

    def add(
        self,
        group: InputGroup,
        moment: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        anew: FactorPair | None = None,
    ) -> None:
        """All linears of one input: pairs by their leaders, dense ones stacked.

        Args:
            moment: H (n, n), the metric of the error.
            targets: by linear, the matrix (m, n) to come near to instead of its own.
            anew: the pair of the whole group instead of the checkpoint's, where both of its
                factors have a grid.
        """
        pairs: dict[str, list[str]] = {}
        both: dict[str, list[str]] = {}
        dense: list[str] = []
        for member in group.members:
            spec = self.checkpoint.low_rank.get(member.name)
            if member.name in self.residual:
                both.setdefault(self.residual[member.name][0], []).append(member.name)
            elif spec is None or self.stock:
                dense.append(member.name)
            else:
                pairs.setdefault(spec.group, []).append(member.name)
        for leader, members in both.items():
            self._add_residual(leader, members, moment, targets or {})
        if dense:
            self._add_dense(dense, moment, targets or {})
        for leader, members in pairs.items():
            self._add_pair(leader, members, moment, targets or {}, anew)

    def clear(self) -> None:
        """Forget a block that is written."""
        self.packed.clear()
        self.found.clear()
        self.leaders.clear()

    def rank_of(self, group: InputGroup) -> int | None:
        """The rank of the pair that the whole group shares; None where it has none."""
        specs = [self.checkpoint.low_rank.get(member.name) for member in group.members]
        shared = all(spec is not None and spec.group == group.leader for spec in specs)
        return self.checkpoint.pair(group.leader).rank if shared and not self.stock else None

    @property
    def stock(self) -> bool:
        """Whether the file holds products of pairs, for an unchanged llama.cpp."""
        return isinstance(self.spec, GgufExport) and self.spec.form == "stock"

    def _add_dense(
        self, names: Sequence[str], moment: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        alike: dict[str, list[str]] = {}  # rows of one type and one moment are worked on together
        grids = {}
        for name in names:
            grid = self._grid("linear", f"{name}.weight", moment.shape[0])
            if grid is not None:
                grids[grid.name] = grid
                alike.setdefault(grid.name, []).append(name)
        for kind, members in alike.items():
            weights = [targets.get(name, self.weights.linear(name)) for name in members]
            sizes = [len(w) for w in weights]
            found = self._one(torch.cat(weights).float(), moment, grids[kind])
            self.found.append((members[0], found))
            self._keep([f"{name}.weight" for name in members], sizes, found, grids[kind])
            self.values.update(zip(members, torch.split(found.values, sizes), strict=True))

    def _add_residual(
        self,
        leader: str,
        names: Sequence[str],
        moment: Tensor,
        targets: Mapping[str, Tensor],
    ) -> None:
        """Quantised matrices and a pair of what they lose, found in turn (core/residual.py)."""
        weights = [targets.get(name, self.weights.linear(name)) for name in names]
        sizes, rank = [len(w) for w in weights], self.residual[names[0]][1]
        tensors_a = [f"{leader}.lr_a.weight"]
        tensors_b = [f"{name}.lr_b.weight" for name in names]
        base_grid, grid_a, grid_b = (
            GRIDS[self.types[name]] for name in (f"{names[0]}.weight", tensors_a[0], tensors_b[0])
        )
        bases: list[Quantized] = []
        factors: list[tuple[Quantized, Quantized]] = []

        def quantize(rest: Tensor) -> Tensor:
            bases.append(self._one(rest, moment, base_grid))
            return bases[-1].values

        def round_pair(pair: FactorPair) -> FactorPair:
            first, second = self._pair(pair, moment, grid_a, grid_b, None)
            assert first is not None and second is not None
            factors.append((first, second))
            return FactorPair(first.values, second.values)

        whole = torch.cat(weights).float()
        found = fit_residual(whole, moment, rank, quantize, round_pair=round_pair, rounds=ROUNDS)
        first, second = factors[found.best]
        base = replace(bases[found.best], error=found.losses[found.best])
        self.found.append((leader, base))
        self._keep([f"{name}.weight" for name in names], sizes, base, base_grid)
        self._keep(tensors_a, [rank], first, grid_a)
        self._keep(tensors_b, sizes, second, grid_b)
        self.leaders |= dict.fromkeys(names, leader)
        values = found.base + found.pair.dense()
        self.values.update(zip(names, torch.split(values, sizes), strict=True))

    def _add_pair(
        self,
        leader: str,
        members: Sequence[str],
        moment: Tensor,
        targets: Mapping[str, Tensor],
        anew: FactorPair | None,
    ) -> None:
        pairs = [self.checkpoint.pair(member) for member in members]
        pair = FactorPair(pairs[0].a.float(), torch.cat([p.b.float() for p in pairs]))
        names_a = [f"{leader}.lr_a.weight"]
        names_b = [f"{member}.lr_b.weight" for member in members]
        grid_a = self._grid("a", names_a[0], pair.a.shape[1])
        grid_b = self._grid("b", names_b[0], pair.rank)
        if anew is not None and grid_a is not None and grid_b is not None:
            pair = anew  # a factor without a grid is written as the checkpoint has it
        sizes = [len(p.b) for p in pairs]
        target = torch.cat([targets[name] for name in members]) if targets else None
        first, second = self._pair(pair, moment, grid_a, grid_b, target)
        a, b = pair.a, pair.b
        if first is not None and grid_a is not None:
            self.found.append((f"{leader}.lr_a", first))
            self._keep(names_a, [len(a)], first, grid_a)
            a = first.values
        if second is not None and grid_b is not None:
            self.found.append((f"{leader}.lr_b", second))
            self._keep(names_b, sizes, second, grid_b)
            b = second.values
        self.values.update(zip(members, torch.split(b @ a, sizes), strict=True))

    def _pair(
        self,
        pair: FactorPair,
        moment: Tensor,
        grid_a: Grid | None,
        grid_b: Grid | None,
        target: Tensor | None,
    ) -> tuple[Quantized | None, Quantized | None]:
        """Both factors. B's refit and scaling need a grid for both: else each for itself."""
        gptq_both = self.quantize.algorithm == "gptq"
        if gptq_both and grid_a is not None and grid_b is not None:
            return gptq_pair(pair, moment, grid_a, grid_b, self._config(), target)
        first = None if grid_a is None else self._one(pair.a, moment, grid_a)
        a = (pair.a if first is None or gptq_both else first.values).double()
        second = None if grid_b is None else self._one(pair.b, a @ moment @ a.T, grid_b)
        return first, second

    def _one(self, weight: Tensor, moment: Tensor, grid: Grid) -> Quantized:
        if self.quantize.algorithm == "rtn":
            return round_to_nearest(weight, moment, grid)
        return gptq(weight.float(), moment, grid, self._config())

    def _config(self) -> GptqConfig:
        settings = self.quantize
        return GptqConfig(settings.damping, settings.order, settings.sweeps)

    def _grid(self, role: str, tensor: str, row_length: int) -> GgufGrid | NBitsGrid | None:
        """The grid of dense linears, of A or of B; None where the exporter quantises."""
        if tensor in self.types:
            return GRIDS[self.types[tensor]]
        if isinstance(self.spec, GgufExport):
            types = Types.of(self.spec, tied=False)
            return GRIDS.get(held(getattr(types, role), row_length))
        return linear_grid(self.spec) if isinstance(self.spec, OnnxExport) else None

    def _keep(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        found: Quantized,
        grid: GgufGrid | NBitsGrid,
    ) -> None:
        """Pack stacked rows and share them out among the tensors."""
        parts = packed_parts(found, grid)
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True):
            rows = {part: array[start:end] for part, array in parts.items()}
            self.packed[name] = PackedWeight(grid.name, rows)


def packed_parts(found: Quantized, grid: GgufGrid | NBitsGrid) -> dict[str, Any]:
    """Arrays by part, rows first, as :mod:`svdexport.packed` holds them."""
    if isinstance(grid, GgufGrid):
        return {GGUF_PART: grid.pack(found.codes, found.scales).numpy()}
    nbits = pack(from_codes(found.codes, found.scales, found.values.shape[1], grid))
    parts = {"weight": nbits.weight, "scales": nbits.scales}
    return parts if nbits.zeros is None else parts | {"zeros": nbits.zeros}
