"""How a traced graph's linears and tied embedding are written: Microsoft's operators, or ONNX's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from svdexport.core.grids_onnx import NBitsGrid, NBitsTensor, quantize, signed
from svdexport.export.onnx_emit import ACCURACY_LEVEL
from svdexport.export.onnx_pack import DataWriter, packed_initializers

_OPSETS = {8: 21, 4: 21, 2: 25}
"""Bits -> the first opset whose DequantizeLinear takes blocks of such integers."""

_IR_VERSIONS = {8: 10, 4: 10, 2: 13}


class Form(ABC):
    """Puts operators and initialisers into a traced graph.

    Weights are (outputs, inputs) float32 arrays; ``grid`` None leaves them as they are.
    """

    def __init__(self, model: ir.Model, data: DataWriter) -> None:
        self.model = model
        self.graph = model.graph
        self.data = data

    @abstractmethod
    def linear(self, node: ir.Node, stem: str, weight: NBitsTensor) -> ir.Value:
        """Make ``node``, a MatMul, multiply with the quantised weight; gives its initialiser."""

    @abstractmethod
    def shared(
        self, name: str, stem: str, weight: np.ndarray, grid: NBitsGrid | None
    ) -> list[ir.Value]:
        """Initialisers that serve the embedding ``name`` and the LM head both."""

    @abstractmethod
    def head(
        self,
        node: ir.Node,
        shared: Sequence[ir.Value],
        shape: tuple[int, ...],
        grid: NBitsGrid | None,
    ) -> None:
        """Make ``node``, a MatMul, the LM head on the shared initialisers."""

    @abstractmethod
    def lookup(
        self, node: ir.Node, shared: Sequence[ir.Value], rows: int, grid: NBitsGrid | None
    ) -> None:
        """Make ``node``, a Gather, read one of the ``rows`` embeddings off the shared ones."""

    has_table = False

    def table(
        self, nodes: Sequence[ir.Node], name: str, weight: np.ndarray, grid: NBitsGrid
    ) -> str:
        """Make Gathers read rows of a quantised embedding that has no head; its initialiser.

        Only where ``has_table``.
        """
        raise ValueError(f"{name}: this form has no table of quantised rows")

    def add(self, name: str, array: np.ndarray, into: ir.Value | None = None) -> ir.Value:
        """Write an array: as a new initialiser, or as the data and new name of one."""
        return self._register(name, self.data.add(name, array), into)

    def _register(
        self, name: str, external: ir.ExternalTensor, into: ir.Value | None = None
    ) -> ir.Value:
        if into is not None:
            del self.graph.initializers[str(into.name)]
            into.name = name
        value = into or ir.Value(name=name)
        value.const_value = external
        value.type = ir.TensorType(external.dtype)
        value.shape = external.shape
        self.graph.register_initializer(value)
        return value

    def _before(
        self,
        node: ir.Node,
        kind: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        **settings: object,
    ) -> ir.Value:
        """A new operator in front of ``node``; gives its output."""
        new = ir.node(kind, inputs, attributes=settings, domain=domain, name=name)  # type: ignore[arg-type]
        new.outputs[0].name = f"{name}/output_0"
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def _replace(
        self,
        node: ir.Node,
        kind: str,
        inputs: list[ir.Value | None],
        settings: dict[str, object],
        domain: str = "",
    ) -> None:
        """Put another operator in a node's place, under its name."""
        new = ir.node(kind, inputs, attributes=settings, domain=domain, name=node.name)  # type: ignore[arg-type]
        before, after = node.outputs[0], new.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], [before], [after])


class ContribForm(Form):
    """MatMulNBits, GatherBlockQuantized and FusedMatMul, operators of onnxruntime's own domain."""

    def __init__(self, model: ir.Model, data: DataWriter) -> None:
        super().__init__(model, data)
        model.opset_imports["com.microsoft"] = 1

    def linear(self, node: ir.Node, stem: str, weight: NBitsTensor) -> ir.Value:
        packed = self._packed(stem, weight, weight.grid)
        self._nbits(node, packed, weight.shape, weight.grid)
        return packed[0]

    def shared(
        self, name: str, stem: str, weight: np.ndarray, grid: NBitsGrid | None
    ) -> list[ir.Value]:
        return [self.add(name, weight)] if grid is None else self._packed(stem, weight, grid)

    def head(
        self,
        node: ir.Node,
        shared: Sequence[ir.Value],
        shape: tuple[int, ...],
        grid: NBitsGrid | None,
    ) -> None:
        if grid is not None:
            self._nbits(node, shared, shape, grid)
            return
        # A Transpose of the embedding would be folded into a second copy.
        inputs = [node.inputs[0], shared[0]]
        self._replace(node, "FusedMatMul", inputs, {"transB": 1}, "com.microsoft")

    def lookup(
        self, node: ir.Node, shared: Sequence[ir.Value], rows: int, grid: NBitsGrid | None
    ) -> None:
        if grid is None:
            node.replace_input_with(0, shared[0])
            return
        # In the head's shape, (rows, blocks, bytes): reshaped codes would be folded into a copy.
        blocks = int(shared[1].shape[1])  # type: ignore[index, arg-type]
        by_block = self._sizes(f"{node.name}_by_block", [rows, blocks, 1])
        scales = self._before(node, "Reshape", f"{node.name}/Scales", [shared[1], by_block])
        inputs = [shared[0], node.inputs[1], scales]
        settings = self._table_settings(grid, quantize_axis=2)
        name = f"{node.name}/GatherBlockQuantized"
        found = self._before(
            node, "GatherBlockQuantized", name, inputs, "com.microsoft", **settings
        )
        flat = self._sizes(f"{node.name}_flat", [0, 0, blocks * grid.block_size])
        self._replace(node, "Reshape", [found, flat], {})

    def _sizes(self, name: str, sizes: list[int]) -> ir.Value:
        """A small constant that stays in the graph."""
        array = np.array(sizes, np.int64)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.data.note(name, array)
        self.graph.register_initializer(value)
        return value

    has_table = True

    def table(
        self, nodes: Sequence[ir.Node], name: str, weight: np.ndarray, grid: NBitsGrid
    ) -> str:
        values = []
        for key, array in packed_initializers(weight, grid).items():
            flat = array.reshape(array.shape[0], -1)
            values.append(self.add(f"{name}{key.removeprefix('weight')}", flat))
        for node in nodes:
            self._gather(node, values, grid)
        return str(values[0].name)

    def _gather(self, node: ir.Node, table: Sequence[ir.Value], grid: NBitsGrid) -> None:
        inputs = [table[0], node.inputs[1], *table[1:]]
        settings = self._table_settings(grid, quantize_axis=1)
        self._replace(node, "GatherBlockQuantized", inputs, settings, "com.microsoft")

    def _table_settings(self, grid: NBitsGrid, quantize_axis: int) -> dict[str, object]:
        settings: dict[str, object] = {"bits": grid.bits, "block_size": grid.block_size}
        return settings | {"gather_axis": 0, "quantize_axis": quantize_axis}

    def _packed(
        self, stem: str, weight: np.ndarray | NBitsTensor, grid: NBitsGrid
    ) -> list[ir.Value]:
        arrays = packed_initializers(weight, grid)
        return [self.add(f"{stem}.{key}", array) for key, array in arrays.items()]

    def _nbits(
        self, node: ir.Node, packed: Sequence[ir.Value], shape: tuple[int, ...], grid: NBitsGrid
    ) -> None:
        settings: dict[str, object] = {"accuracy_level": ACCURACY_LEVEL, "bits": grid.bits}
        settings |= {"block_size": grid.block_size, "K": shape[1], "N": shape[0]}
        self._replace(
            node, "MatMulNBits", [node.inputs[0], *packed], settings, domain="com.microsoft"
        )


class StandardForm(Form):
    """DequantizeLinear and MatMul. Weights are stored (inputs, outputs), blocks along the inputs:
    the one layout that onnxruntime turns into its quantised kernel when it loads the graph.
    """

    def __init__(self, model: ir.Model, data: DataWriter, grid: NBitsGrid | None) -> None:
        super().__init__(model, data)
        if grid is not None:
            # Every operator traced at opset 20 means the same there.
            model.opset_imports[""] = _OPSETS[grid.bits]
            model.ir_version = _IR_VERSIONS[grid.bits]

    def linear(self, node: ir.Node, stem: str, weight: NBitsTensor) -> ir.Value:
        codes, scales = self._codes(stem, weight)
        self._dequantised(node, [codes, scales], weight.grid)
        return codes

    def shared(
        self, name: str, stem: str, weight: np.ndarray, grid: NBitsGrid | None
    ) -> list[ir.Value]:
        if grid is None:
            return [self.add(name, np.ascontiguousarray(weight.T))]
        return self._codes(stem, quantize(weight, grid))

    def head(
        self,
        node: ir.Node,
        shared: Sequence[ir.Value],
        shape: tuple[int, ...],
        grid: NBitsGrid | None,
    ) -> None:
        if grid is None:
            node.replace_input_with(1, shared[0])
        else:
            self._dequantised(node, shared, grid)

    def lookup(
        self, node: ir.Node, shared: Sequence[ir.Value], rows: int, grid: NBitsGrid | None
    ) -> None:
        tokens, turned = node.inputs[1], []
        for value in shared:  # (width, vocabulary) -> (batch, tokens, width)
            name = f"{node.name}/{value.name}"
            columns = self._before(node, "Gather", name, [value, tokens], axis=1)
            inputs: list[ir.Value | None] = [columns]
            turned.append(self._before(node, "Transpose", f"{name}/T", inputs, perm=[1, 2, 0]))
        if grid is None:
            self._replace(node, "Identity", [turned[0]], {})
        else:
            settings: dict[str, object] = {"axis": 2, "block_size": grid.block_size}
            self._replace(node, "DequantizeLinear", [*turned], settings)

    def _codes(self, stem: str, weight: NBitsTensor) -> list[ir.Value]:
        codes, scales = signed(weight)
        bits = weight.grid.bits
        name = f"{stem}.weight_Q{bits}"
        stored = self._register(name, self.data.add_codes(name, codes, bits))
        return [stored, self.add(f"{stem}.weight_scales", scales)]

    def _dequantised(self, node: ir.Node, values: Sequence[ir.Value], grid: NBitsGrid) -> None:
        name = f"{node.name}/DequantizeLinear"
        weight = self._before(
            node, "DequantizeLinear", name, [*values], axis=0, block_size=grid.block_size
        )
        node.replace_input_with(1, weight)
