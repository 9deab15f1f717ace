"""A traced graph made ready: stand-ins replaced by the checkpoint's weights, at the precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from svdexport.core.grids_onnx import NBitsGrid
from svdexport.errors import InputError
from svdexport.export.onnx_emit import ACCURACY_LEVEL, HEAD, BuildPlan, Emission
from svdexport.export.onnx_pack import DataWriter, packed_initializers
from svdexport.export.onnx_trace import PREFIX, stand_in_of, trace, traced_model

IR_VERSION = 10

_INLINE = 16
"""Constants of up to so many numbers stay in the graph: sizes and axes, which loaders look at."""


def build_general(plan: BuildPlan, data: DataWriter, config: Any) -> tuple[ir.Model, Emission]:
    """Trace the plan's model and write its weights.

    Raises InputError where torch.onnx cannot trace it, or where a linear does not come out as one
    product with its weight.
    """
    model: Any = traced_model(config, plan.checkpoint)
    heads, width, layers = cache_shape(config)
    embedding = next(
        (f"{n}.weight" for n, m in model.named_modules() if m is model.get_input_embeddings()), ""
    )
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), "")
    traced = trace(model, heads, width, layers)
    del model
    traced.ir_version = IR_VERSION
    traced.opset_imports["com.microsoft"] = 1
    writer = _Writer(traced, plan, data, head, embedding)
    writer.write()
    return traced, writer.emission


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(key-value heads, head size, layers) of a decoder's cache, from its config."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads), int(width), int(text.num_hidden_layers)


class _Writer:
    """Walks a traced graph's initialisers once; see :func:`build_general`."""

    def __init__(
        self, model: ir.Model, plan: BuildPlan, data: DataWriter, head: str, embedding: str
    ) -> None:
        self.graph = model.graph
        self.plan = plan
        self.data = data
        self.head = head
        self.embedding = embedding
        self.emission = Emission()
        checkpoint = plan.checkpoint
        tied = not checkpoint.has(f"{head}.weight") and head not in checkpoint.low_rank
        grid = plan.head_grid
        whole = grid is None or checkpoint.tensor(embedding).shape[1] % grid.block_size == 0
        self.emission.shared_embedding = tied and whole
        self._tied = tied
        self._shared: list[ir.Value] = []

    def write(self) -> None:
        missing = set(self.plan.checkpoint.low_rank)
        for name, value in list(self.graph.initializers.items()):
            found = stand_in_of(name)
            if found is None:
                self._write_as_is(name, value)
            else:
                self._write_linear(*found, value)
                missing.discard(found[0])
        if missing:
            raise InputError(f"{self.plan.source}: not in the traced graph: {sorted(missing)[0]}")

    # Linears

    def _write_linear(self, linear: str, leaf: str, stand_in: ir.Value) -> None:
        node = self._only_product(linear, stand_in)
        head = linear == self.head
        stem = f"{linear}.{leaf}" if leaf in ("lr_a", "lr_b") else linear
        node.name = HEAD if head and leaf != "lr_a" else f"/{stem.replace('.', '/')}/MatMul"
        grid = self.plan.head_grid if head else self.plan.grid
        if head and self.emission.shared_embedding:
            self._tied_head(node, grid)
            del self.graph.initializers[str(stand_in.name)]
            return
        tensor = self.embedding if head and self._tied else f"{stem}.weight"
        weight = self.plan.checkpoint.tensor(tensor).float().numpy()
        if leaf == "weight_t":
            weight = weight.T
            self.emission.transposed.append(tensor)
        if weight.shape[::-1] != tuple(stand_in.shape or ()):
            raise InputError(
                f"{self.plan.checkpoint.path}: tensor {tensor} has shape {weight.shape}, "
                f"config.json means {tuple(stand_in.shape or ())[::-1]}"
            )
        if grid is None:
            name = f"{stem}.MatMul.weight"
            self._initializer(name, np.ascontiguousarray(weight.T), into=stand_in)
        else:
            packed = self._packed(f"{stem}.MatMul", weight, grid)
            self._swap_nbits(node, packed, weight.shape, grid)
            del self.graph.initializers[str(stand_in.name)]
            name = str(packed[0].name)
        if tensor != self.embedding:  # which has its own initialiser
            self.emission.rows[name] = [(tensor, weight.shape[0])]

    def _only_product(self, linear: str, stand_in: ir.Value) -> ir.Node:
        nodes = [usage.node for usage in stand_in.uses()]
        if len(nodes) != 1 or nodes[0].op_type != "MatMul" or nodes[0].inputs[1] is not stand_in:
            kinds = ", ".join(sorted({node.op_type for node in nodes})) or "nothing"
            raise InputError(f"{self.plan.source}: {linear} is traced as {kinds}, not one MatMul")
        return nodes[0]

    def _packed(self, stem: str, weight: np.ndarray, grid: NBitsGrid) -> list[ir.Value]:
        arrays = packed_initializers(weight, grid)
        values = [self._initializer(f"{stem}.{key}", array) for key, array in arrays.items()]
        self.emission.grids[str(values[0].name)] = grid
        return values

    def _swap_nbits(
        self, node: ir.Node, packed: list[ir.Value], shape: tuple[int, ...], grid: NBitsGrid
    ) -> None:
        settings = {"accuracy_level": ACCURACY_LEVEL, "bits": grid.bits}
        settings |= {"block_size": grid.block_size, "K": shape[1], "N": shape[0]}
        self._replace(node, "MatMulNBits", [node.inputs[0], *packed], settings)

    def _replace(
        self, node: ir.Node, kind: str, inputs: list[ir.Value | None], settings: dict[str, int]
    ) -> None:
        """Put an operator of onnxruntime's own domain in a node's place, under its name."""
        new = ir.node(kind, inputs, attributes=settings, domain="com.microsoft", name=node.name)
        before, after = node.outputs[0], new.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], [before], [after])

    # A tied embedding and LM head: one initialiser for both

    def _tied_head(self, node: ir.Node, grid: NBitsGrid | None) -> None:
        if grid is None:
            embedding = self._shared_values(None)[0]
            self._replace(node, "FusedMatMul", [node.inputs[0], embedding], {"transB": 1})
        else:
            shape = tuple(self.plan.checkpoint.tensor(self.embedding).shape)
            self._swap_nbits(node, self._shared_values(grid), shape, grid)

    def _shared_values(self, grid: NBitsGrid | None) -> list[ir.Value]:
        """The shared initialisers; written when first asked for."""
        if not self._shared:
            weight = self.plan.checkpoint.tensor(self.embedding).float().numpy()
            if grid is None:
                self._shared = [self._initializer(self.embedding, weight)]
            else:
                self._shared = self._packed("lm_head.MatMul", weight, grid)
            self.emission.rows[str(self._shared[0].name)] = [(self.embedding, weight.shape[0])]
        return self._shared

    def _share_embedding(self, value: ir.Value) -> None:
        grid = self.plan.head_grid
        shared = self._shared_values(grid)
        for node in [usage.node for usage in value.uses()]:
            if node.op_type != "Gather":
                raise InputError(f"{self.plan.source}: the embedding is read by {node.op_type}")
            if grid is None:
                node.replace_input_with(0, shared[0])
                continue
            flat = np.array([value.shape[0], -1], np.int64)  # type: ignore[index]
            size = ir.Value(name=f"{node.name}_flat", const_value=ir.tensor(flat))
            size.const_value.name = size.name  # type: ignore[union-attr]
            self.data.note(str(size.name), flat)
            self.graph.register_initializer(size)
            rows = ir.node("Reshape", [shared[0], size], name=f"{node.name}/Reshape")
            rows.outputs[0].name = f"{node.name}/Reshape/output_0"
            self.graph.insert_before(node, rows)
            settings = {"bits": grid.bits, "block_size": grid.block_size}
            settings |= {"gather_axis": 0, "quantize_axis": 1}
            inputs = [rows.outputs[0], node.inputs[1], *shared[1:]]
            self._replace(node, "GatherBlockQuantized", inputs, settings)
        self.graph.initializers.pop(str(value.name), None)

    # Everything else

    def _write_as_is(self, name: str, value: ir.Value) -> None:
        if name == PREFIX + self.embedding:
            if self.emission.shared_embedding:
                self._share_embedding(value)
            else:
                self._write_embedding(value)
            return
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size <= _INLINE:
            self.data.note(name, array)
        else:
            self._initializer(name.removeprefix(PREFIX), array, into=value)

    def _write_embedding(self, value: ir.Value) -> None:
        """Token embeddings of their own, in float16 where that loses nothing."""
        array = self.plan.checkpoint.tensor(self.embedding).float().numpy()
        half = array.astype(np.float16)
        nodes = [usage.node for usage in value.uses()]
        lossless = bool((half.astype(np.float32) == array).all())
        narrow = lossless and all(node.op_type == "Gather" for node in nodes)
        self.emission.rows[self.embedding] = [(self.embedding, array.shape[0])]
        self._initializer(self.embedding, half if narrow else array, into=value)
        for node in nodes if narrow else []:
            gathered = node.outputs[0]
            widen = ir.node("Cast", [gathered], attributes={"to": ir.DataType.FLOAT})
            wide, widen.name = widen.outputs[0], f"{node.name}/Widen"
            wide.name, wide.type, wide.shape = (
                f"{gathered.name}_wide",
                gathered.type,
                gathered.shape,
            )
            ir.convenience.replace_all_uses_with(gathered, wide)
            widen.replace_input_with(0, gathered)
            gathered.type = ir.TensorType(ir.DataType.FLOAT16)
            self.graph.insert_after(node, widen)

    def _initializer(self, name: str, array: np.ndarray, into: ir.Value | None = None) -> ir.Value:
        """Write an array: as a new initialiser, or as the data and new name of one."""
        external = self.data.add(name, array)
        if into is not None:
            del self.graph.initializers[str(into.name)]
            into.name = name
        value = into or ir.Value(name=name)
        value.const_value = external
        value.type = ir.TensorType(external.dtype)
        value.shape = external.shape
        self.graph.register_initializer(value)
        return value


def genai_settings(config: Any, graph: str) -> dict[str, Any]:
    """genai_config.json of a traced graph: a plain decoder with position_ids and its own cache."""
    heads, width, layers = cache_shape(config)
    text = config.get_text_config()
    end = text.eos_token_id
    pad = text.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    length = int(getattr(text, "max_position_embeddings", 0) or text.n_positions)
    return {
        "model": {
            "bos_token_id": text.bos_token_id if text.bos_token_id is not None else 0,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": width,
                "hidden_size": int(text.hidden_size),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": int(text.num_attention_heads),
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
            },
            "eos_token_id": end,
            "pad_token_id": first_end if pad is None else pad,
            "type": "decoder",
            "vocab_size": int(text.vocab_size),
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
