"""The onnxruntime-genai model builder, told to read a svdexport checkpoint and to emit factor pairs.

The builder walks a Hugging Face model and emits a graph; here the model is an empty shell (weights
on the meta device) and the projections come from the checkpoint, one at a time, quantised by us.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_onnx import NBitsGrid
from svdexport.errors import InputError, MissingExtraError
from svdexport.export.onnx_pack import DataWriter, packed_initializers

FAMILIES = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
}
"""Architectures whose graphs were compared with torch, and their class in the builder."""

ROPE_TYPES = ("default", "llama3")
"""Rotary embeddings that the builder computes as transformers does."""

ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8; level 0 is 3 to 28 times slower than fp32 at 8 and 2 bits."""

Row = tuple[str, int]
"""A tensor of the checkpoint and how many output rows of an initialiser it owns, in order."""


@dataclass
class Emission:
    """What a build wrote besides the graph.

    Attributes:
        rows: initialiser that holds linears -> the checkpoint's tensors it is made of, in order.
        grids: weight initialiser -> its grid, where it is quantised.
        shared_embedding: the LM head's weight also serves the embedding.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    grids: dict[str, NBitsGrid] = field(default_factory=dict)
    shared_embedding: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """What the builder needs to know.

    Attributes:
        checkpoint: weights.
        source: Hugging Face folder of the original model: config and tokenizer.
        grid: grid of the linears; None for float32.
        head_grid: grid of the LM head; None for float32.
        share_embedding: store a tied embedding and LM head once.
        stack: members of a group that no packed operator takes become one MatMul and a Split.
    """

    checkpoint: Checkpoint
    source: Path
    grid: NBitsGrid | None
    head_grid: NBitsGrid | None
    share_embedding: bool = True
    stack: bool = False


def load_config(source: Path) -> Any:
    """The model's config, by transformers. Raises InputError where the builder is not exact."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True)
    names = getattr(config, "architectures", None) or ["(none)"]
    if names[0] not in FAMILIES:
        raise InputError(
            f"{source}/config.json: ONNX export knows {', '.join(FAMILIES)}; {names[0]} is not among "
            "them because the onnxruntime-genai builder's graph for it was not shown to be exact"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise InputError(
            f"{source}/config.json: rotary embedding of type {rope!r}; ONNX export is exact for "
            f"{', '.join(ROPE_TYPES)} only"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        # Mistral slides in every layer and says so nowhere; the builder would ignore the window.
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    config._name_or_path = str(source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def shell(config: Any, checkpoint: Checkpoint) -> torch.nn.Module:
    """The model with every parameter but the linears' weights; those stay on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    linears = {
        f"{name}.weight" for name, module in model.named_modules() if _is_linear(module)
    }
    for name, parameter in list(model.named_parameters()):
        if name in linears:
            continue
        tensor = checkpoint.tensor(name)
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"config.json means {tuple(parameter.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(tensor.float(), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
    return model


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def build(plan: BuildPlan, data: DataWriter, out: Path) -> tuple[ir.Model, Any, Emission]:
    """Emit the graph; returns it, the builder (for genai_config.json) and what was emitted.

    The builder prints as it goes; that goes to stderr, since stdout may carry JSON.
    """
    config = load_config(plan.source)
    with contextlib.redirect_stdout(sys.stderr):
        maker = _builder_class(config.architectures[0])(config, plan, data, out)
        maker.make_model(str(plan.source))
    maker.model.graph.sort()
    return maker.model, maker, maker.emission


def _builder_class(architecture: str) -> Callable[..., Any]:
    try:
        import onnxruntime_genai.models.builder as families
    except ImportError:
        raise MissingExtraError("onnx", "ONNX export") from None
    base = getattr(families, FAMILIES[architecture])
    return type(f"Svdexport{base.__name__}", (_PairMixin, base), {})


class _PairMixin:
    """Overrides of the builder's ``Model``: where weights come from and how a linear is emitted."""

    # Provided by the builder's class.
    attention_attrs: dict[str, Any]
    values: dict[str, Any]
    model: ir.Model
    io_dtype: ir.DataType
    weights: Any
    make_value: Any
    make_node: Any
    make_split: Any
    make_hidden_state_shape: Any
    vocab_size: int
    hidden_size: int
    input_names: dict[str, Any]

    def __init__(self, config: Any, plan: BuildPlan, data: DataWriter, out: Path) -> None:
        self.plan = plan
        self.data = data
        self.config = config
        self.emission = Emission()
        self._names: dict[int, str] = {}
        self._outputs: dict[tuple[str, str], str] = {}
        options = {"hf_token": None, "fuse_qkv": True, "windowed_kv_cache": False}
        super().__init__(  # type: ignore[call-arg]
            config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(out), options
        )

    # Weights

    def load_weights(self, input_path: str) -> Any:
        model = shell(self.config, self.plan.checkpoint)
        self._names = {id(m): name for name, m in model.named_modules() if _is_linear(m)}
        return model

    def has_lm_head(self, module: torch.nn.Module) -> bool:
        # The builder takes any linear as wide as the vocabulary; ask the model instead.
        return module is self.weights.get_output_embeddings()

    def make_initializer(
        self, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False
    ) -> None:
        if raw:
            raise NotImplementedError(f"initialiser {name}: encoded payloads are not emitted here")
        array = tensor.detach().cpu() if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor)
        if to is not None:
            array = array.to(ir.tensor_adapters.to_torch_dtype(to))
        self.add_array(name, array.numpy())

    def add_array(self, name: str, array: np.ndarray) -> None:
        external = self.data.add(name, array)
        value = self.make_value(name, external.dtype, external.shape)
        value.const_value = external
        self.model.graph.register_initializer(value)

    # Linears

    def make_attention_input_proj(self, layer_id: int, attention: Any, root: str, **kw: Any) -> None:
        # A packed layer after an unpacked one would otherwise keep the latter's paths.
        self.attention_attrs["k_path"] = self.attention_attrs["v_path"] = ""
        super().make_attention_input_proj(layer_id, attention, root, **kw)  # type: ignore[misc]

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
        if self.plan.stack:
            members = self._stack_of(name)
            if len(members) > 1:
                return self._emit_stack(members, basename, root_input)
        return self.emit([name], basename, root_input, **kwargs)

    def emit(
        self, members: Sequence[str], basename: str, root_input: str, **kwargs: Any
    ) -> str:
        """One product for linears that share an input and (all or none) a first factor."""
        pair = self.plan.checkpoint.low_rank.get(members[0])
        if pair is None:
            names = [self._dense_name(member) for member in members]
            return self._product(names, basename, root_input, **kwargs)
        key = (pair.group, root_input)
        if key not in self._outputs:
            node = f"{_parent(basename)}/lr_a/MatMul"
            if len(self.plan.checkpoint.groups()[pair.group]) > len(members):
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

    def _product(
        self, tensors: Sequence[str], node: str, root_input: str, **kwargs: Any
    ) -> str:
        """A MatMul or MatMulNBits of the stacked tensors (rows are outputs)."""
        parts = [self.plan.checkpoint.tensor(name).float().numpy() for name in tensors]
        weight = np.concatenate(parts) if len(parts) > 1 else parts[0]
        rows = list(zip(tensors, (part.shape[0] for part in parts), strict=True))
        head = node == "/lm_head/MatMul"
        grid = self.plan.head_grid if head else self.plan.grid
        output = "logits" if kwargs.get("logits", False) else f"{node}/output_0"
        if grid is not None:
            self._nbits_node(weight, rows, grid, node, root_input, output)
        elif head and self.emission.shared_embedding:
            self._tied_head_node(node, root_input, output)
        else:
            name = f"{_dotted(node)}.weight"
            self.add_array(name, np.ascontiguousarray(weight.T))
            self.emission.rows[name] = rows
            self.make_node("MatMul", inputs=[root_input, name], outputs=[output], name=node)
        shape = self.make_hidden_state_shape(
            seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=weight.shape[0]
        )
        self.make_value(output, self.io_dtype, shape=shape)
        return node

    def _nbits_node(
        self, weight: np.ndarray, rows: list[Row], grid: NBitsGrid, node: str, root: str, out: str
    ) -> None:
        inputs = [root]
        if node == "/lm_head/MatMul" and self.emission.shared_embedding:
            inputs += self._shared_names(grid)  # written for the embedding
        else:
            inputs += self._add_packed(weight, rows, grid, node)
        self.make_node(
            "MatMulNBits",
            inputs=inputs,
            outputs=[out],
            name=node,
            domain="com.microsoft",
            accuracy_level=ACCURACY_LEVEL,
            bits=grid.bits,
            block_size=grid.block_size,
            K=weight.shape[1],
            N=weight.shape[0],
        )

    def _add_packed(
        self, weight: np.ndarray, rows: list[Row], grid: NBitsGrid, node: str
    ) -> list[str]:
        names = []
        for suffix, array in packed_initializers(weight, grid).items():
            names.append(f"{_dotted(node)}.{suffix}")
            self.add_array(names[-1], array)
        self.emission.rows[names[0]] = rows
        self.emission.grids[names[0]] = grid
        return names

    # Groups that no packed operator takes: gate and up

    def _stack_of(self, name: str) -> list[str]:
        pair = self.plan.checkpoint.low_rank.get(name)
        members = self.plan.checkpoint.groups()[pair.group] if pair is not None else [name]
        return members if all(member.endswith(("gate_proj", "up_proj")) for member in members) else []

    def _emit_stack(self, members: list[str], basename: str, root_input: str) -> str:
        base = _parent(_parent(basename))
        outputs = [f"{base}/{m.rpartition('.')[2]}/MatMul/output_0" for m in members]
        if outputs[0] not in self.values:
            node = self.emit(members, f"{base}/gate_up_proj/MatMul", root_input)
            shapes = [self.plan.checkpoint.pair(m).out_features for m in members]
            self.make_split(
                f"{base}/gate_up_proj/Split",
                [f"{node}/output_0", f"/model/constants/INT64/{shapes}"],
                outputs,
                [self.io_dtype] * len(members),
                [self.make_hidden_state_shape(last_dim=width) for width in shapes],
            )
        return basename

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
        self.emission.shared_embedding = tied and self.plan.share_embedding
        rows = [(self._embedding_name(), embedding.shape[0])]
        grid = self.plan.head_grid
        if self.emission.shared_embedding and grid is not None:
            return self._quantized_gather(embedding, rows, grid, basename)
        array = embedding.detach().numpy()
        half = array.astype(np.float16)
        exact = bool((half.astype(np.float32) == array).all())
        keep_float = self.emission.shared_embedding or not exact
        self.add_array(name, array if keep_float else half)
        self.emission.rows[name] = rows
        gathered = f"{basename}/Gather/output_0"
        self.make_node(
            "Gather",
            inputs=[name, self.input_names["input_ids"]],
            outputs=[gathered],
            name=f"{basename}/Gather",
        )
        if keep_float:
            return gathered
        self.make_value(gathered, ir.DataType.FLOAT16, shape=self.make_hidden_state_shape())
        cast = f"{basename}/Widen"
        self.make_node(
            "Cast", inputs=[gathered], outputs=[f"{cast}/output_0"], name=cast, to=ir.DataType.FLOAT
        )
        return f"{cast}/output_0"

    def _tied_head_node(self, node: str, root: str, output: str) -> None:
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
        names = [f"lm_head.MatMul.weight_Q{grid.bits}", "lm_head.MatMul.weight_scales"]
        return names if grid.symmetric else [*names, "lm_head.MatMul.weight_zero_points"]

    def _quantized_gather(
        self, embedding: Any, rows: list[Row], grid: NBitsGrid, basename: str
    ) -> str:
        """Rows of the LM head's packed weight, dequantised as they are looked up."""
        weight = embedding.detach().numpy()
        names = self._add_packed(weight, rows, grid, "/lm_head/MatMul")
        packed = self.values[names[0]].shape
        flat = int(packed[1]) * int(packed[2])
        reshaped = f"{basename}/Reshape/output_0"
        self.make_node(
            "Reshape",
            inputs=[names[0], f"/model/constants/INT64/[{weight.shape[0]}, {flat}]"],
            outputs=[reshaped],
            name=f"{basename}/Reshape",
        )
        self.make_value(reshaped, ir.DataType.UINT8, shape=[weight.shape[0], flat])
        node = f"{basename}/GatherBlockQuantized"
        output = f"{node}/output_0"
        self.make_node(
            "GatherBlockQuantized",
            inputs=[reshaped, self.input_names["input_ids"], *names[1:]],
            outputs=[output],
            name=node,
            domain="com.microsoft",
            bits=grid.bits,
            block_size=grid.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        width = grid.blocks(weight.shape[1]) * grid.block_size
        if width == weight.shape[1]:
            return output
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=width))
        cut = f"{basename}/Slice"
        ends = ["[0]", f"[{weight.shape[1]}]", "[-1]"]
        self.make_node(
            "Slice",
            inputs=[output, *(f"/model/constants/INT64/{end}" for end in ends)],
            outputs=[f"{cut}/output_0"],
            name=cut,
        )
        return f"{cut}/output_0"


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _dotted(node: str) -> str:
    return node[1:].replace("/", ".")


def initializer_rows(emission: Emission) -> Iterator[tuple[str, list[Row]]]:
    yield from sorted(emission.rows.items())
