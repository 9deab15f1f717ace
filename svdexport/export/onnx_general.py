"""A traced graph made ready: stand-ins replaced by the checkpoint's weights, at the precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdexport.core.grids_onnx import NBitsTensor
from svdexport.errors import InputError
from svdexport.export.onnx_emit import HEAD
from svdexport.export.onnx_forms import ContribForm, Form, StandardForm
from svdexport.export.onnx_pack import DataWriter, quantized, to_half
from svdexport.export.onnx_plan import BuildPlan, Emission, table_grid
from svdexport.export.onnx_trace import PREFIX, latent_layers, stand_in_of, trace, traced_model
from svdexport.runtimes.ort_rt import load_tokenizer

IR_VERSION = 10

_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
"""What config.json calls the context."""

_LENGTH = 2048
"""The context of a model that names none, as BLOOM: any number, which genai wants to know."""

_INLINE = 16
"""Constants of up to so many numbers stay in the graph: sizes and axes, which loaders look at."""


def build_general(plan: BuildPlan, data: DataWriter, config: Any) -> tuple[ir.Model, Emission]:
    """Trace the plan's model and write its weights.

    Raises InputError where torch.onnx cannot trace it, or where a linear does not come out as one
    product with its weight.
    """
    dtype = torch.float16 if plan.half else torch.float32
    model: Any = traced_model(config, plan.checkpoint, dtype, plan.latent, plan.trusted)
    latent = latent_layers(model)
    if plan.latent and plan.checkpoint.low_rank and not latent:
        raise InputError(
            f"{plan.checkpoint.path}: kv_cache: latent needs a v projection whose rank is a "
            "multiple of the head size and below the width of all key-value heads; see "
            "compress.rank_multiple and compress.group"
        )
    heads, width, layers = cache_shape(config)
    traced, emission = prepared(trace(model, heads, width, layers), plan, data, model)
    emission.latent_layers = latent
    size = dtype.itemsize
    before = 2 * layers * heads * width * size
    saved = sum(heads * width - rank for rank in latent.values()) * size
    emission.cache_bytes = (before, before - saved)
    return traced, emission


def prepared(
    traced: ir.Model, plan: BuildPlan, data: DataWriter, model: Any
) -> tuple[ir.Model, Emission]:
    """The traced graph of ``model`` with the plan's weights in it. Raises as build_general does."""
    embedding = next(
        (f"{n}.weight" for n, m in model.named_modules() if m is model.get_input_embeddings()), ""
    )
    output = model.get_output_embeddings()
    named = ((n, m) for n, m in model.named_modules() if m is output)
    head = None if output is None else next((name for name, _ in named), None)
    traced.ir_version = IR_VERSION
    standard = plan.standard or plan.half  # WebGPU has no FusedMatMul
    form = StandardForm(traced, data, plan.grid) if standard else ContribForm(traced, data)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    writer = _Writer(form, plan, head, embedding, tied)
    writer.write()
    return traced, writer.emission


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(key-value heads, head size, layers) of a decoder's cache, from its config."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads), int(width), int(text.num_hidden_layers)


class _Writer:
    """Walks a traced graph's initialisers once; see :func:`build_general`."""

    def __init__(
        self,
        form: Form,
        plan: BuildPlan,
        head: str | None,
        embedding: str,
        tied: bool,
    ) -> None:
        self.form = form
        self.graph = form.graph
        self.plan = plan
        self.head = head
        self.embedding = embedding
        self.emission = Emission()
        checkpoint = plan.checkpoint
        self.emission.shared_embedding = (
            tied
            and head is not None
            and not checkpoint.has(f"{head}.weight")
            and head not in checkpoint.low_rank
        )
        grid = plan.head_grid
        self._table_grid = grid and table_grid(grid, int(checkpoint.tensor(embedding).shape[1]))
        # Half of an encoder's bytes are its embedding, which no head shares.
        self._quantised_table = head is None and self._table_grid is not None
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
        stem = f"{linear}.{leaf}" if leaf.startswith("lr_") else linear
        node.name = HEAD if head and leaf != "lr_a" else f"/{stem.replace('.', '/')}/MatMul"
        grid = self.plan.head_grid if head else self.plan.grid
        if head and self.emission.shared_embedding:
            shape = tuple(self.plan.checkpoint.tensor(self.embedding).shape)
            self.form.head(node, self._shared_values(), shape, self._table_grid)
            del self.graph.initializers[str(stand_in.name)]
            return
        tensor = f"{stem}.weight"
        if leaf.startswith("lr_b_"):
            tensor = f"{linear}.lr_b.weight"
        whole = self.plan.checkpoint.tensor(tensor).float().numpy()
        if leaf == "weight_t":
            whole = whole.T
            self.emission.transposed.append(tensor)
        rows = slice(None)
        if leaf.startswith("lr_b_"):  # one head's
            width, index = int(stand_in.shape[1]), int(leaf[5:])  # type: ignore[index, arg-type]
            rows = slice(index * width, (index + 1) * width)
        weight = whole[rows]
        if weight.shape[::-1] != tuple(stand_in.shape or ()):
            raise InputError(
                f"{self.plan.checkpoint.path}: tensor {tensor} has shape {weight.shape}, "
                f"config.json means {tuple(stand_in.shape or ())[::-1]}"
            )
        if grid is None:
            name = f"{stem}.MatMul.weight"
            self.form.add(name, self._float(weight.T, tensor), into=stand_in)
        else:
            stored = quantized(whole, grid, [tensor], self.plan.packed)
            parts = (stored.codes[rows], stored.scales[rows], stored.zeros[rows])
            stored = NBitsTensor(*parts, stored.columns, grid)
            name = str(self.form.linear(node, f"{stem}.MatMul", stored).name)
            self.emission.grids[name] = grid
            self.emission.columns[name] = stored.columns
            del self.graph.initializers[str(stand_in.name)]
        self.emission.rows[name] = [(tensor, weight.shape[0])]

    def _only_product(self, linear: str, stand_in: ir.Value) -> ir.Node:
        nodes = [usage.node for usage in stand_in.uses()]
        if len(nodes) != 1 or nodes[0].op_type != "MatMul" or nodes[0].inputs[1] is not stand_in:
            kinds = ", ".join(sorted({node.op_type for node in nodes})) or "nothing"
            raise InputError(f"{self.plan.source}: {linear} is traced as {kinds}, not one MatMul")
        return nodes[0]

    def _float(self, array: np.ndarray, name: str) -> np.ndarray:
        array = np.ascontiguousarray(array)
        return to_half(array, name) if self.plan.half else array

    # A tied embedding and LM head: one initialiser for both

    def _shared_values(self) -> list[ir.Value]:
        """The shared initialisers; written when first asked for."""
        if not self._shared:
            grid = self._table_grid
            weight = self.plan.checkpoint.tensor(self.embedding).float().numpy()
            array = self._float(weight, self.embedding)
            self._shared = self.form.shared(self.embedding, "lm_head.MatMul", array, grid)
            name = str(self._shared[0].name)
            self.emission.rows[name] = [(self.embedding, weight.shape[0])]
            if grid is not None:
                self.emission.grids[name] = grid
                self.emission.columns[name] = weight.shape[1]
        return self._shared

    def _share_embedding(self, value: ir.Value) -> None:
        shared = self._shared_values()
        for node in [usage.node for usage in value.uses()]:
            if node.op_type != "Gather":
                raise InputError(f"{self.plan.source}: the embedding is read by {node.op_type}")
            self.form.lookup(node, shared, int(value.shape[0]), self._table_grid)  # type: ignore[index, arg-type]
        self.graph.initializers.pop(str(value.name), None)

    def _quantise_table(self, value: ir.Value) -> None:
        grid = self._table_grid
        assert grid is not None
        weight = self.plan.checkpoint.tensor(self.embedding).float().numpy()
        nodes = [usage.node for usage in value.uses()]
        table = self.form.table(nodes, self.embedding, weight, grid)
        self.emission.rows[table] = [(self.embedding, weight.shape[0])]
        self.emission.grids[table] = grid
        self.emission.columns[table] = weight.shape[1]
        self.graph.initializers.pop(str(value.name), None)

    # Everything else

    def _write_as_is(self, name: str, value: ir.Value) -> None:
        if name == PREFIX + self.embedding:
            if self._quantised_table and self.form.has_table:
                self._quantise_table(value)
            elif self.emission.shared_embedding:
                self._share_embedding(value)
            else:
                self._write_embedding(value)
            return
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.size <= _INLINE:
            self.form.data.note(name, array)
        else:
            self.form.add(name.removeprefix(PREFIX), array, into=value)

    def _write_embedding(self, value: ir.Value) -> None:
        """Token embeddings of their own, in float16 where that loses nothing."""
        array = self.plan.checkpoint.tensor(self.embedding).float().numpy()
        half = array.astype(np.float16)
        nodes = [usage.node for usage in value.uses()]
        lossless = bool((half.astype(np.float32) == array).all())
        narrow = not self.plan.half and lossless and all(n.op_type == "Gather" for n in nodes)
        self.emission.rows[self.embedding] = [(self.embedding, array.shape[0])]
        stored = half if narrow else self._float(array, self.embedding)
        self.form.add(self.embedding, stored, into=value)
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


def _special_token(source: Path, text: Any, key: str) -> Any:
    """A token's id, or ids: of generation_config.json, else of config.json."""
    file = source / "generation_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return getattr(text, key, None) if given.get(key) is None else given[key]


def _end_token(source: Path) -> int | None:
    """The tokenizer's."""
    try:
        found: int | None = load_tokenizer(source).eos_token_id
    except InputError:
        return None
    return found


def genai_settings(config: Any, source: Path, graph: str) -> dict[str, Any] | None:
    """genai_config.json of a traced graph: a plain decoder with position_ids and its own cache.

    None where neither the model nor its tokenizer names an end token, which genai demands.
    """
    heads, width, layers = cache_shape(config)
    text = config.get_text_config()
    begin, end, pad = (
        _special_token(source, text, f"{name}_token_id") for name in ("bos", "eos", "pad")
    )
    if end is None or end == []:
        end = _end_token(source)
        if end is None:
            return None
    first_end = end[0] if isinstance(end, list) else end
    length = next((n for key in _LENGTHS if (n := getattr(text, key, None))), _LENGTH)
    return {
        "model": {
            "bos_token_id": 0 if begin is None else begin,
            "context_length": int(length),
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
            "max_length": int(length),
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
