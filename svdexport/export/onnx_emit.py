"""How a linear is emitted into the builder's graph: dense, or as a pair; float32 or MatMulNBits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdexport.core.grids_onnx import NBitsGrid
from svdexport.errors import InputError
from svdexport.export.onnx_pack import DataWriter, packed_initializers, quantized, to_half
from svdexport.export.onnx_plan import BuildPlan, Emission, Row

ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8; level 0 is 3 to 28 times slower than fp32 at 8 and 2 bits."""

HEAD = "/lm_head/MatMul"
"""The builder's name for the LM head's node."""


class PairEmitter:
    """Overrides of the builder's ``Model``: where weights come from and how a linear is emitted."""

    # Provided by the builder's class.
    attention_attrs: dict[str, Any]
    values: dict[str, Any]
    model: ir.Model
    io_dtype: ir.DataType
    weights: Any
    make_value: Any
    make_node: Any
    make_hidden_state_shape: Any
    vocab_size: int
    hidden_size: int
    head_size: int
    rope_attrs: dict[str, Any]
    input_names: dict[str, Any]

    def __init__(
        self, config: Any, model: torch.nn.Module, plan: BuildPlan, data: DataWriter, out: Path
    ) -> None:
        self.plan = plan
        self.data = data
        self.config = config
        self.emission = Emission()
        self._model = model
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        self._names = {id(module): name for name, module in linears}
        self._outputs: dict[tuple[str, str], str] = {}
        options = {"hf_token": None, "fuse_qkv": True, "windowed_kv_cache": False}
        options["fuse_qk_norm_gqa"] = False  # the CPU, where files are checked, cannot
        dtype, provider = (
            (ir.DataType.FLOAT16, "webgpu") if plan.half else (ir.DataType.FLOAT, "cpu")
        )
        parent: Any = super()
        parent.__init__(config, dtype, dtype, provider, str(out), options)

    # Weights

    def load_weights(self, input_path: str) -> torch.nn.Module:
        return self._model

    def has_lm_head(self, module: torch.nn.Module) -> bool:
        # The builder takes any linear as wide as the vocabulary; ask the model instead.
        return module is self.weights.get_output_embeddings()

    def make_initializer(
        self, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False
    ) -> None:
        if raw:
            raise NotImplementedError(f"initialiser {name}: encoded payloads are not emitted here")
        array = torch.as_tensor(tensor).detach()
        if to is not None:
            array = array.to(ir.tensor_adapters.to_torch_dtype(to))
        self.add_array(name, array.numpy())

    def add_array(self, name: str, array: np.ndarray) -> None:
        external = self.data.add(name, array)
        value = self.make_value(name, external.dtype, external.shape)
        value.const_value = external
        self.model.graph.register_initializer(value)

    # What is made of values; sizes alone need none of it (onnx_size.py)

    def stacked(self, tensors: Sequence[str]) -> tuple[np.ndarray, list[Row]]:
        """The stacked tensors of one product in float32, and which rows each of them owns."""
        parts = [self.plan.checkpoint.tensor(name).float().numpy() for name in tensors]
        rows = list(zip(tensors, (part.shape[0] for part in parts), strict=True))
        return (np.concatenate(parts) if len(parts) > 1 else parts[0]), rows

    def packed(
        self, weight: np.ndarray, grid: NBitsGrid, tensors: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The initialisers of a quantised product, by their suffix."""
        return packed_initializers(quantized(weight, grid, tensors, self.plan.packed), grid)

    def halved(self, array: np.ndarray, name: str) -> np.ndarray:
        """In float16. Raises InputError where a value is too large for it."""
        return to_half(array, name)

    def halved_exactly(self, array: np.ndarray) -> np.ndarray | None:
        """In float16 where that loses nothing, else None."""
        half = array.astype(np.float16)
        return half if bool((half.astype(np.float32) == array).all()) else None

    # Linears

    def make_attention_input_proj(
        self, layer_id: int, attention: Any, root_input: str, **kwargs: Any
    ) -> None:
        # A packed layer after an unpacked one would otherwise keep the latter's paths.
        self.attention_attrs["k_path"] = self.attention_attrs["v_path"] = ""
        parent: Any = super()
        parent.make_attention_input_proj(layer_id, attention, root_input, **kwargs)

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        if len({linear.bias is None for linear in linears}) != 1:
            return False
        pairs = [self.plan.checkpoint.low_rank.get(self._names[id(linear)]) for linear in linears]
        if any(pair is None for pair in pairs):
            return all(pair is None for pair in pairs)
        return len({pair.group for pair in pairs if pair is not None}) == 1

    def make_packed_matmul(
        self, q: Any, k: Any, v: Any, basename: str, root_input: str, **kwargs: Any
    ) -> str:
        members = [self._names[id(linear)] for linear in (q, k, v)]
        return self.emit(members, basename, root_input, **kwargs)

    def make_matmul(self, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        name = self._names[id(matmul)]
        return self.emit([name], basename, root_input, **kwargs)

    def emit(self, members: Sequence[str], basename: str, root_input: str, **kwargs: Any) -> str:
        """One product for linears that share an input and (all or none) a first factor."""
        pair = self.plan.checkpoint.low_rank.get(members[0])
        if pair is None:
            names = [self._dense_name(member) for member in members]
            return self._product(names, basename, root_input, **kwargs)
        key = (pair.group, root_input)
        if key not in self._outputs:
            node = f"{_parent(basename)}/lr_a/MatMul"
            if len(self.plan.checkpoint.groups[pair.group]) > len(members):
                node = f"{_parent(_parent(basename))}/{pair.group.rpartition('.')[2]}_lr_a/MatMul"
            self._product([f"{pair.group}.lr_a.weight"], node, root_input)
            self._outputs[key] = f"{node}/output_0"
        names = [f"{member}.lr_b.weight" for member in members]
        return self._product(names, basename, self._outputs[key], **kwargs)

    def _dense_name(self, member: str) -> str:
        name = f"{member}.weight"
        if self.plan.checkpoint.has(name):
            return name
        if self._is_head(member) and self._is_tied():
            return self._embedding_name()
        raise InputError(f"{self.plan.checkpoint.path}: tensor {name} is missing")

    def _product(self, tensors: Sequence[str], node: str, root_input: str, **kwargs: Any) -> str:
        """A MatMul or MatMulNBits of the stacked tensors (rows are outputs)."""
        weight, rows = self.stacked(tensors)
        head = node == HEAD
        grid = self.plan.head_grid if head else self.plan.grid
        output = "logits" if kwargs.get("logits", False) else f"{node}/output_0"
        if grid is not None:
            inputs = [root_input, *self._packed_names(weight, rows, grid, node)]
            self._nbits_node(weight.shape, grid, inputs, output)
        elif head and self.emission.shared_embedding:
            self._tied_head_node(node, root_input, output)
        else:
            name = f"{_dotted(node)}.weight"
            self.add_array(name, self.halved(weight.T, name) if self.plan.half else weight.T)
            self.emission.rows[name] = rows
            self.make_node("MatMul", inputs=[root_input, name], outputs=[output], name=node)
        shape = self.make_hidden_state_shape(
            seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=weight.shape[0]
        )
        self.make_value(output, self.io_dtype, shape=shape)
        return node

    def _packed_names(
        self, weight: np.ndarray, rows: list[Row], grid: NBitsGrid, node: str
    ) -> list[str]:
        if node == HEAD and self.emission.shared_embedding:
            return self._shared_names(grid)  # written for the embedding
        return self._add_packed(weight, rows, grid, node)

    def _nbits_node(
        self, shape: tuple[int, ...], grid: NBitsGrid, inputs: list[str], output: str
    ) -> None:
        name = HEAD if output == "logits" else output.removesuffix("/output_0")
        self.make_node(
            "MatMulNBits",
            inputs=inputs,
            outputs=[output],
            name=name,
            domain="com.microsoft",
            accuracy_level=ACCURACY_LEVEL,
            bits=grid.bits,
            block_size=grid.block_size,
            K=shape[1],
            N=shape[0],
        )

    def _add_packed(
        self, weight: np.ndarray, rows: list[Row], grid: NBitsGrid, node: str
    ) -> list[str]:
        names = []
        for suffix, array in self.packed(weight, grid, [tensor for tensor, _ in rows]).items():
            names.append(f"{_dotted(node)}.{suffix}")
            self.add_array(names[-1], array)
        self.emission.rows[names[0]] = rows
        self.emission.grids[names[0]] = grid
        self.emission.columns[names[0]] = weight.shape[1]
        return names

    # Embedding and LM head

    def _is_head(self, member: str) -> bool:
        return self._names.get(id(self.weights.get_output_embeddings())) == member

    def _is_tied(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def _embedding_name(self) -> str:
        for name, module in self.weights.named_modules():
            if module is self.weights.get_input_embeddings():
                return f"{name}.weight"
        raise InputError(f"{self.plan.source}: the model has no input embedding")

    def make_embedding_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:
        name = "model.embed_tokens.weight"
        head = self._names.get(id(self.weights.get_output_embeddings()), "")
        tied = self._is_tied() and head not in self.plan.checkpoint.low_rank
        self.emission.shared_embedding = tied
        rows = [(self._embedding_name(), embedding.shape[0])]
        grid = self.plan.head_grid
        if self.emission.shared_embedding and grid is not None:
            return self._quantized_gather(embedding, rows, grid, basename)
        array = embedding.detach().numpy()
        if self.plan.half:
            return self._half_lookup(array, rows, basename)
        half = None if self.emission.shared_embedding else self.halved_exactly(array)
        self.add_array(name, array if half is None else half)
        self.emission.rows[name] = rows
        gathered = f"{basename}/Gather/output_0"
        self.make_node(
            "Gather",
            inputs=[name, self.input_names["input_ids"]],
            outputs=[gathered],
            name=f"{basename}/Gather",
        )
        if half is None:
            return gathered
        self.make_value(gathered, ir.DataType.FLOAT16, shape=self.make_hidden_state_shape())
        cast = f"{basename}/Widen"
        self.make_node(
            "Cast", inputs=[gathered], outputs=[f"{cast}/output_0"], name=cast, to=ir.DataType.FLOAT
        )
        return f"{cast}/output_0"

    def _half_lookup(self, array: np.ndarray, rows: list[Row], basename: str) -> str:
        """Embedding in float16. A tied one is stored as the head multiplies with it, (width,
        vocabulary), and looked up by columns: WebGPU has no FusedMatMul.
        """
        name, tied = rows[0][0], self.emission.shared_embedding
        array = self.halved(array, name)
        self.add_array(name, array.T if tied else array)
        self.emission.rows[name] = rows
        gathered = f"{basename}/Gather/output_0"
        self.make_node(
            "Gather",
            inputs=[name, self.input_names["input_ids"]],
            outputs=[gathered],
            name=f"{basename}/Gather",
            axis=int(tied),
        )
        if not tied:
            return gathered
        batch, tokens, width = self.make_hidden_state_shape()
        self.make_value(gathered, self.io_dtype, shape=[width, batch, tokens])
        turned = f"{basename}/Transpose"
        self.make_node(
            "Transpose",
            inputs=[gathered],
            outputs=[f"{turned}/output_0"],
            name=turned,
            perm=[1, 2, 0],
        )
        return f"{turned}/output_0"

    def _reshaped(
        self, value: str, node: str, sizes: list[int], dtype: ir.DataType, shape: Any
    ) -> str:
        output, wanted = f"{node}/output_0", f"/model/constants/INT64/{sizes}"
        self.make_node("Reshape", inputs=[value, wanted], outputs=[output], name=node)
        self.make_value(output, dtype, shape=shape)
        return output

    def _tied_head_node(self, node: str, root: str, output: str) -> None:
        if self.plan.half:
            self.make_node(
                "MatMul", inputs=[root, self._embedding_name()], outputs=[output], name=node
            )
            return
        # FusedMatMul reads the embedding transposed: a Transpose would be folded into a copy.
        self.make_node(
            "FusedMatMul",
            inputs=[root, "model.embed_tokens.weight"],
            outputs=[output],
            name=node,
            domain="com.microsoft",
            transB=1,
        )

    def _shared_names(self, grid: NBitsGrid) -> list[str]:
        return [f"lm_head.MatMul.weight_Q{grid.bits}", "lm_head.MatMul.weight_scales"]

    def _quantized_gather(
        self, embedding: Any, rows: list[Row], grid: NBitsGrid, basename: str
    ) -> str:
        """Rows of the LM head's packed weight, dequantised as they are looked up.

        They are read in the LM head's shape, (rows, blocks, bytes), and come as blocks: a Reshape
        of the weight would be folded into a second copy of it.
        """
        weight = embedding.detach().numpy()
        names = self._add_packed(weight, rows, grid, HEAD)
        blocks = grid.blocks(weight.shape[1])
        size, kind = [weight.shape[0], blocks, 1], ir.DataType.FLOAT
        scales = self._reshaped(names[1], f"{basename}/Scales", size, kind, size)
        node = f"{basename}/GatherBlockQuantized"
        gathered = f"{node}/output_0"
        self.make_node(
            "GatherBlockQuantized",
            inputs=[names[0], self.input_names["input_ids"], scales],
            outputs=[gathered],
            name=node,
            domain="com.microsoft",
            bits=grid.bits,
            block_size=grid.block_size,
            gather_axis=0,
            quantize_axis=2,
        )
        batch, tokens, _ = self.make_hidden_state_shape()
        self.make_value(gathered, self.io_dtype, shape=[batch, tokens, blocks, grid.block_size])
        width = blocks * grid.block_size
        meant = self.make_hidden_state_shape(last_dim=width)
        flat = f"{basename}/Reshape"
        output = self._reshaped(gathered, flat, [0, 0, width], self.io_dtype, meant)
        if width == weight.shape[1]:
            return output
        cut = f"{basename}/Slice"
        ends = (f"/model/constants/INT64/{end}" for end in ([0], [weight.shape[1]], [-1]))
        self.make_node("Slice", inputs=[output, *ends], outputs=[f"{cut}/output_0"], name=cut)
        return f"{cut}/output_0"


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _dotted(node: str) -> str:
    return node[1:].replace("/", ".")
