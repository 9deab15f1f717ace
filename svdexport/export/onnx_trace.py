"""The general path to a decoder's graph: torch.onnx traces the model, with its cache as inputs.

For families whose graph by the onnxruntime-genai builder is not exact. Linears are traced with
stand-ins of no size (one number, expanded), under names that say which linear they are; the true
weights are written from the checkpoint afterwards, one at a time.
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from svdexport.checkpoint import Checkpoint
from svdexport.core.linears import is_linear, is_transposed
from svdexport.errors import InputError
from svdexport.export.onnx_latent import ATTENTION, LatentValue, register
from svdexport.runtimes.torch_rt import auto_class

OPSET = 20
"""The last opset before attention becomes one operator, which onnxruntime's CPU runs no faster."""

PREFIX = "model."
"""What the traced wrapper puts before every name of the model's own."""

_STAND_IN = "stand_in_"
_TRACE_BATCH, _TRACE_TOKENS, _TRACE_PAST = 2, 3, 4


class _Linear(nn.Module):
    """x -> x W_1 W_2 ... + bias, each W a stand-in (inputs, outputs)."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        bias: Tensor | None,
        dtype: torch.dtype,
        numbers: Iterator[int],
    ) -> None:
        super().__init__()
        self.leaves = tuple(shapes)
        for leaf, (rows, columns) in shapes.items():
            # Equal constants could be merged by an optimiser: give each its own number.
            number = _number(next(numbers), dtype)
            self.register_buffer(_STAND_IN + leaf, number.expand(columns, rows))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._leader: list[_Linear] = []

    def forward(self, x: Tensor) -> Tensor:
        for leader in self._leader:
            x = x @ leader.get_buffer(_STAND_IN + "lr_a")
        for leaf in self.leaves:
            x = x @ self.get_buffer(_STAND_IN + leaf)
        return x if self.bias is None else x + self.bias


def _number(index: int, dtype: torch.dtype) -> Tensor:
    """A number of its own for each index, whatever it is worth."""
    bits = torch.int16 if dtype == torch.float16 else torch.int32
    return torch.tensor(index, dtype=bits).view(dtype)


class _Decoder(nn.Module):
    """The model with flat keys and values in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = found.past_key_values.layers
        return (found.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def traced_model(
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    latent: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model with stand-ins for its linears and everything else from the checkpoint."""
    if latent:
        register()
    attention = ATTENTION if latent else "eager"
    # The experts' other implementations have kernels that torch.onnx does not know.
    config._experts_implementation = "batched_mm"
    with _parameters_on_meta():
        model: nn.Module = auto_class(checkpoint.path).from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    model.eval()
    made: dict[str, _Linear] = {}
    numbers = itertools.count(1)
    for name, module in list(model.named_modules()):
        if is_linear(module):
            made[name] = _stand_in(name, module, checkpoint, dtype, numbers)
            model.set_submodule(name, made[name])
    for name, spec in checkpoint.low_rank.items():
        if name not in made:
            raise InputError(f"{checkpoint.path}: {name} is compressed but is no linear here")
        if spec.group != name:
            made[name]._leader.append(made[spec.group])
    if latent:
        for name in checkpoint.low_rank:
            _make_latent(model, name, made[name], dtype, numbers)
    _load_rest(model, checkpoint, dtype, trust_remote_code)
    return model


def _make_latent(
    model: nn.Module, name: str, linear: _Linear, dtype: torch.dtype, numbers: Iterator[int]
) -> None:
    """Turn a v projection into its latent form where that makes the cache smaller.

    The cache is cut into heads of the model's own width, which the rank must be a multiple of.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    width = getattr(parent, "head_dim", None)
    if not name.endswith(".v_proj") or width is None or not hasattr(parent, "o_proj"):
        return
    rank, outputs = linear.get_buffer(_STAND_IN + "lr_b").shape
    if rank % width or rank >= outputs:
        return
    heads = range(outputs // width)
    second = LatentValue(linear, tuple(f"{_STAND_IN}lr_b_{head}" for head in heads), linear.bias)
    del linear._buffers[_STAND_IN + "lr_b"]
    linear.leaves = tuple(leaf for leaf in linear.leaves if leaf != "lr_b")
    linear.bias = None
    for stand_in in second.stand_ins:
        second.register_buffer(stand_in, _number(next(numbers), dtype).expand(rank, width))
    model.set_submodule(name, second)


def latent_layers(model: nn.Module) -> dict[int, int]:
    """Layer -> rank, where the cache is latent."""
    return {
        int(module.layer_idx): int(second.get_buffer(second.stand_ins[0]).shape[0])  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(second := getattr(module, "v_proj", None), LatentValue)
    }


def _stand_in(
    name: str,
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    numbers: Iterator[int],
) -> _Linear:
    rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
    if is_transposed(module):
        rows, columns = columns, rows
    bias = checkpoint.tensor(f"{name}.bias").to(dtype) if module.bias is not None else None
    spec = checkpoint.low_rank.get(name)
    if spec is None:
        leaf = "weight_t" if is_transposed(module) else "weight"
        return _Linear({leaf: (rows, columns)}, bias, dtype, numbers)
    shapes = {"lr_a": (spec.rank, columns)} if spec.group == name else {}
    return _Linear({**shapes, "lr_b": (rows, spec.rank)}, bias, dtype, numbers)


def _load_rest(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool
) -> None:
    loaded: nn.Module | None = None
    made = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():  # parameters, and buffers that are saved
        if (name in made and tensor.device.type != "meta") or stand_in_of(name):
            continue
        if checkpoint.has(name):
            value = checkpoint.tensor(name)
        else:  # transformers makes it of several tensors, as it stacks experts
            loaded = loaded or _loaded(checkpoint, trust_remote_code)
            value = _value(loaded, name).detach()
        if value.shape != tensor.shape:
            raise InputError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(value.shape)}, "
                f"config.json means {tuple(tensor.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        if name in made:
            value = nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value.to(tensor.dtype))


def _value(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer; of experts that stand apart their stack, pairs multiplied."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, nn.ModuleList):
        value: Tensor = getattr(module, leaf)
        return value
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    rows = [torch.cat([getattr(expert, part).weight for part in parts]) for expert in module]
    return torch.stack(rows)


def _loaded(checkpoint: Checkpoint, trust_remote_code: bool) -> nn.Module:
    """The whole model in memory."""
    model: nn.Module = auto_class(checkpoint.path).from_pretrained(
        checkpoint.path,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this context new parameters have no memory, while buffers (rotary tables) are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def trace(model: nn.Module, heads: int, width: int, layers: int) -> ir.Model:
    """Trace the model with ``layers`` caches of (batch, heads, past, width), batch and past free.

    Raises InputError where torch.onnx cannot.
    """
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    latent = latent_layers(model)
    past = [
        torch.zeros(_TRACE_BATCH, count, _TRACE_PAST, width, dtype=dtype)
        for layer in range(layers)
        for count in (heads, latent[layer] // width if layer in latent else heads)
    ]
    tokens, total = _TRACE_TOKENS, _TRACE_TOKENS + _TRACE_PAST
    positions = torch.arange(_TRACE_PAST, total)[None].repeat(_TRACE_BATCH, 1)
    inputs = {
        "input_ids": torch.ones(_TRACE_BATCH, tokens, dtype=torch.long),
        "attention_mask": torch.ones(_TRACE_BATCH, total, dtype=torch.long),
        "position_ids": positions,
        "past": past,
    }
    free = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "past": [{0: "batch_size", 2: "past_sequence_length"}] * len(past),
    }
    names = [f"{{}}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return exported(
        _Decoder(model),
        inputs,
        free,
        [*list(inputs)[:3], *(name.format("past_key_values") for name in names)],
        ["logits", *(name.format("present") for name in names)],
    )


def exported(
    wrapper: nn.Module,
    inputs: dict[str, Any],
    free: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    """What torch.onnx makes of a module whose ``model`` is the traced one, ``free`` axes named.

    Raises InputError where torch.onnx cannot.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                wrapper,
                (),
                kwargs=inputs,
                dynamic_shapes=free,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
            )
        except Exception as error:  # torch.onnx raises what the traced code raises, too
            raise InputError(
                f"{type(wrapper.model).__name__}: torch.onnx cannot trace it ({_reason(error)})"
            ) from error
    assert program is not None
    graph: ir.Model = program.model
    _drop_notes(graph)
    return graph


def _reason(error: Exception) -> str:
    """One line: of the cause, where torch.onnx only says in colours in which step it failed."""
    cause = error.__cause__ or error
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).split("\n")
    said = [line.strip() for line in lines if line.strip()] or [repr(cause)]
    return " ".join(said[:2]) if said[0].endswith(":") else said[0]


def _drop_notes(model: ir.Model) -> None:
    """Forget where each operator and value comes from: whole stack traces, with local paths."""
    for graph in (model.graph, *model.functions.values()):
        noted: list[Any] = [graph, *graph.inputs]
        for node in ir.traversal.RecursiveGraphIterator(graph):
            noted += [node, *node.inputs, *node.outputs]
        for one in noted:
            if one is not None:
                one.metadata_props.clear()
                one.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells of every optional pass that did not apply."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def stand_in_of(initializer: str) -> tuple[str, str] | None:
    """(linear, leaf) of a stand-in's initialiser, None for others.

    The leaf is ``weight``, ``weight_t`` (stored as inputs x outputs), ``lr_a`` or ``lr_b``; or
    ``lr_b_N``, one head's rows of the latter.
    """
    owner, _, leaf = initializer.rpartition(".")
    if not leaf.startswith(_STAND_IN):
        return None
    return owner.removeprefix(PREFIX).removesuffix(".first"), leaf.removeprefix(_STAND_IN)
