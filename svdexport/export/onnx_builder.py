"""The onnxruntime-genai model builder, told to read our checkpoints and to emit factor pairs.

The builder walks a Hugging Face model and emits a graph; here the model is an empty shell (weights
on the meta device) and the projections come from the checkpoint, one at a time, quantised by us.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.errors import InputError, MissingExtraError
from svdexport.export.onnx_emit import PairEmitter
from svdexport.export.onnx_pack import DataWriter
from svdexport.export.onnx_plan import FAMILIES, BuildPlan, Emission


def load_config(source: Path, trust_remote_code: bool = False) -> Any:
    """The model's config, by transformers, without a quantisation of its own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source, local_files_only=True, trust_remote_code=trust_remote_code
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
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
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


def build(
    plan: BuildPlan, data: DataWriter, config: Any, out: Path
) -> tuple[ir.Model, dict[str, Any], Emission]:
    """Emit the graph; returns it, the contents of genai_config.json and what was emitted."""
    maker = emitted(plan, data, config, out)
    with contextlib.redirect_stdout(io.StringIO()):
        maker.make_genai_config(config, {}, str(out))
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    emission: Emission = maker.emission
    return maker.model, settings, emission


def emitted(
    plan: BuildPlan,
    data: DataWriter,
    config: Any,
    out: Path,
    emitter: type[PairEmitter] = PairEmitter,
) -> Any:
    """The builder, done with the graph.

    It prints every layer as it goes; progress is ours to show, so that is dropped.
    """
    model = shell(config, plan.checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        maker = _builder_class(config.architectures[0], emitter)(config, model, plan, data, out)
        maker.make_model(str(plan.source))
    _name_cache_width(maker.model.graph, int(maker.head_size))
    maker.model.graph.sort()
    maker.stamp_build_metadata(maker.model)
    return maker


def _name_cache_width(graph: ir.Graph, width: int) -> None:
    """The builder leaves the width of the cache open; clients that make an empty one need it."""
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape.dims[:3], width])


def _builder_class(architecture: str, emitter: type[PairEmitter]) -> Callable[..., Any]:
    try:
        import onnxruntime_genai.models.builder as families
    except ImportError as error:
        raise MissingExtraError("onnx", f"ONNX export ({error})") from None
    base = getattr(families, FAMILIES[architecture])
    return type(f"Svdexport{base.__name__}", (emitter, base), {})
