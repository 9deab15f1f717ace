"""Linears of an ONNX graph, ours or anyone's: constant weights, and pairs of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError
from svdexport.safety.documents import parse_json, quoted

ROWS_KEY = "svdexport.rows"
"""Model metadata: initialiser -> [checkpoint tensor, rows], to take stacked weights apart."""

_SMALL_BITS = {21: 4, 22: 4, 25: 2, 26: 2}
"""Bits of TensorProto's UINT4, INT4, UINT2 and INT2."""

_PASS = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Unsqueeze")
"""Operators between a stored weight and the product that uses it."""

_MOST_PASSES = 8
"""Of these one after another; files have two or three."""

_DEFAULT_BITS = 4
"""Of a MatMulNBits that does not say, by onnxruntime's ContribOperators.md."""


@dataclass(frozen=True)
class Product:
    """A multiplication with a constant weight.

    Attributes:
        node: its name.
        source: name of the value it multiplies.
        output: name of its result.
        weight: name of the main initialiser.
        shape: (outputs, inputs).
        type: type of the stored weight, for example ``FLOAT`` or ``4 bits, blocks of 32``.
        initializers: every initialiser it reads, scales and zero points among them.
    """

    node: str
    source: str
    output: str
    weight: str
    shape: tuple[int, int]
    type: str
    initializers: tuple[str, ...]


class OnnxGraph:
    """A model.onnx without its external data. Raises InputError where onnx cannot parse it."""

    def __init__(self, path: Path) -> None:
        import onnx

        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf's DecodeError is no public class
            raise InputError(f"{path}: not an ONNX model ({error})") from None
        self.path = path
        self.nodes = list(self.model.graph.node)
        self.initializers = {t.name: t for t in self.model.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.metadata = {entry.key: entry.value for entry in self.model.metadata_props}

    def rows(self) -> dict[str, list[tuple[str, int]]]:
        """Our own note of which checkpoint tensors an initialiser holds; empty in foreign files."""
        found = parse_json(self.metadata.get(ROWS_KEY, "{}").encode(), f"{self.path}: {ROWS_KEY}")
        try:
            return {key: [(str(name), int(n)) for name, n in value] for key, value in found.items()}
        except (TypeError, ValueError):
            raise InputError(f"{self.path}: {ROWS_KEY} is malformed") from None

    def nbytes(self, name: str) -> int:
        """Bytes of an initialiser's data."""
        import onnx

        tensor = self.initializers[name]
        bits = _SMALL_BITS.get(tensor.data_type)
        if bits is not None:
            return (int(math.prod(tensor.dims)) * bits + 7) // 8
        if tensor.data_type == onnx.TensorProto.STRING:
            return sum(len(text) for text in tensor.string_data)
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return int(math.prod(tensor.dims) * kind.itemsize)

    def products(self) -> list[Product]:
        """Every MatMul, Gemm, FusedMatMul or MatMulNBits with a constant weight, in order."""
        found = []
        for node in self.nodes:
            if node.op_type not in ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits"):
                continue
            if len(node.input) < 2 or not node.output:
                raise InputError(
                    f"{self.path}: node {quoted(node.name)}: a {node.op_type} of one input"
                )
            if node.op_type == "MatMulNBits":
                found.append(self._nbits(node))
            else:
                found += self._float(node)
        return found

    def _nbits(self, node: Any) -> Product:
        a = {"bits": _DEFAULT_BITS} | _integers(node)
        missing = {"N", "K", "block_size"} - a.keys()
        if missing or a["N"] < 1:
            raise InputError(
                f"{self.path}: node {quoted(node.name)}: a MatMulNBits without "
                f"{', '.join(sorted(missing)) or 'outputs'}"
            )
        kind = f"{a['bits']} bits, blocks of {a['block_size']}"
        read = tuple(name for name in node.input[1:] if name in self.initializers)
        shape = (a["N"], a["K"])
        return Product(node.name, node.input[0], node.output[0], node.input[1], shape, kind, read)

    def _float(self, node: Any) -> list[Product]:
        import onnx

        read = self._constants_behind(node.input[1])
        tensors = [self.initializers[name] for name in read]
        if not tensors or len(tensors[0].dims) != 2:
            return []
        flips = node.op_type != "MatMul" and bool(_integers(node).get("transB"))
        flips ^= self._is_transposed(node.input[1])
        dims = (int(tensors[0].dims[0]), int(tensors[0].dims[1]))
        kind = onnx.TensorProto.DataType.Name(tensors[0].data_type)
        shape = dims if flips else (dims[1], dims[0])
        if not shape[0]:
            raise InputError(f"{self.path}: weight {quoted(read[0])} has no outputs")
        return [Product(node.name, node.input[0], node.output[0], read[0], shape, kind, read)]

    def _constants_behind(self, value: str, behind: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Initialisers that alone make a value; the main one first. Empty where it is computed.

        Raises InputError where the operators go round in a circle.
        """
        if value in self.initializers:
            return (value,)
        if value in behind:
            raise InputError(f"{self.path}: {quoted(value)} is computed from itself")
        node = self.producers.get(value)
        if node is None or node.op_type not in _PASS or len(behind) == _MOST_PASSES:
            return ()
        behind = (*behind, value)
        parts = [self._constants_behind(name, behind) for name in node.input[:3] if name]
        if not parts or not parts[0]:
            return ()
        return tuple(name for part in parts for name in part)

    def _is_transposed(self, value: str) -> bool:
        node = self.producers.get(value)
        if node is None or node.op_type not in _PASS:
            return False
        return bool(node.op_type == "Transpose") ^ self._is_transposed(node.input[0])


def layer_of(name: str) -> tuple[int | None, str]:
    """Layer number in a node's or tensor's name, and what follows it."""
    match = re.search(r"(?:layers?|h|blocks?)[./](\d+)[./](.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _integers(node: Any) -> dict[str, int]:
    return {attribute.name: int(attribute.i) for attribute in node.attribute}
