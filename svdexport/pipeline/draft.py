"""``init``: a commented recipe that fits a model and a target, to begin with."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from svdexport.checkpoint import is_encoder
from svdexport.errors import RecipeError
from svdexport.files import write_atomic
from svdexport.models.loader import configuration_of
from svdexport.models.shapes import Shapes, shapes_of
from svdexport.recipe import load_recipe

Target = Literal["laptop", "phone", "browser", "server"]
TARGETS: tuple[Target, ...] = get_args(Target)

LARGE = 1_000_000_000  # parameters from which 4 bits lose little
K_BLOCK = 256  # elements of a K-quant's block: rows must be whole blocks
# A 32-bit WebAssembly heap ends at 4 GB; file, copy and cache must fit together.
BROWSER_BYTES = "1500MB"


@dataclass(frozen=True)
class Choice:
    """What a target asks for: why, exports, share of parameters, rank multiple, gates."""

    why: str
    exports: tuple[str, ...]
    param_ratio: float
    rank_multiple: int
    gates: tuple[str, ...]


def draft(model: Path, target: Target, out: Path) -> Path:
    """Write a recipe for a model (folder or GGUF) and a target; returns ``out``.

    Raises:
        RecipeError: ``out`` exists, or the target is not known. InputError: the model is broken.
    """
    if target not in TARGETS:
        raise RecipeError(f"--for {target}: not a target; known: {', '.join(TARGETS)}")
    if out.exists():
        raise RecipeError(f"{out}: exists; remove it, or name another file with --out")
    with tempfile.TemporaryDirectory(prefix="svdexport-") as scratch:
        shapes = shapes_of(configuration_of(model, Path(scratch)) if model.is_file() else model)
    encoder = is_encoder({"architectures": shapes.config.architectures})
    write_atomic(out, (_encoder_text if encoder else _text)(model, target, out, shapes))
    load_recipe(out)  # what is handed out must be right
    return out


def choose(target: Target, shapes: Shapes) -> Choice:
    """The settings of a target for a model of these shapes."""
    large = shapes.count >= LARGE
    widths = {linear.in_features for linear in shapes.structure.linears()}
    k_quants = all(width % K_BLOCK == 0 for width in widths)
    if target in ("laptop", "server"):
        small_type = "Q4_K" if k_quants else "Q4_0"
        kind = small_type if large and target == "laptop" else "Q8_0"
        exports = [f"{{format: gguf, type: {kind}}}"]
        why = "llama.cpp (the build that knows low-rank pairs; see `svdexport doctor`)"
        if target == "server":
            exports.append("{format: checkpoint}")
            why += ", and a checkpoint for transformers"
        multiple = K_BLOCK if kind == "Q4_K" else 32
        speed = ("min_prefill_speedup: 1.05", "min_decode_speedup: 1.0")
        return Choice(why, tuple(exports), 0.8 if large else 0.85, multiple, speed)
    why = "onnxruntime and onnxruntime-genai on a phone's processor"
    gates = ("min_prefill_speedup: 1.0",)
    if target == "browser":
        why = "onnxruntime in a browser, where the download and 4 GB of memory are the limit"
        gates = (f"max_bytes: {BROWSER_BYTES}",)
        # WebAssembly has no kernel for MatMulNBits; see docs/onnx.md
        exports = ["{format: onnx, precision: int8, operators: standard}"]
        return Choice(why, tuple(exports), 0.85, 32, gates)
    return Choice(why, ("{format: onnx, precision: int4, block_size: 32}",), 0.85, 32, gates)


def _comment(text: str) -> str:
    return textwrap.fill(text, 90, initial_indent="# ", subsequent_indent="#   ")


def _place(model: Path, out: Path) -> str:
    """A model's path as a recipe at ``out`` names it."""
    return json.dumps(os.path.relpath(model, out.parent), ensure_ascii=False)


def _head(model: Path, target: Target, out: Path, shapes: Shapes, why: str) -> str:
    return f"""\
# {model.name} ({shapes.count / 1e6:,.0f} M parameters) for a {target}.
{_comment(f"Runs on {why}.")}
# Written by `svdexport init`. `svdexport plan {out.name}` shows sizes, memory and time;
# `svdexport run {out.name}` does it all and resumes where it was stopped.
schema: 1
"""


def _samples(shapes: Shapes, length: int) -> int:
    """Windows of calibration: twice as many tokens as the widest layer has inputs, at least."""
    widest = max(linear.in_features for linear in shapes.structure.linears())
    return max(64, -(-2 * widest // length))


def _encoder_text(model: Path, target: Target, out: Path, shapes: Shapes) -> str:
    """A sentence encoder: ONNX whatever the target, and texts of the user's own."""
    browser = target == "browser"
    length = min(128, _longest(shapes))
    samples = _samples(shapes, length)
    head = _head(model, target, out, shapes, f"onnxruntime{' in a browser' if browser else ''}")
    return f"""\
{head}model:
  path: {_place(model, out)}
  # hub_name: owner/name   # on the Hugging Face Hub, for the model card's `base_model`
calibration:           # an encoder writes no text: give two files of your own
  source: file
  file: calibration.txt
  samples: {samples}          # windows of `length` tokens; at least twice the widest layer's inputs
  length: {length}
compress:
  method: svd_llm      # needs no language model's loss, which an encoder does not have
  budget:
    param_ratio: 0.85   # kept share of the parameters: less is faster and worse
  allocate: uniform
  rank_multiple: 32
export:
  - {{format: onnx, precision: int8{", operators: standard" if browser else ""}}}
evaluate:
  text: evaluation.txt   # another text than that of the calibration
  context: {length // 2}
  windows: 64
speed:
  prefill: [{length}]
gates:                 # a run that fails one publishes nothing (docs/verdict.md)
  min_cosine: 0.85     # of embeddings to those of the dense model
  {f"max_bytes: {BROWSER_BYTES}" if browser else "min_prefill_speedup: 1.0"}
"""


def _longest(shapes: Shapes) -> int:
    return int(getattr(shapes.config, "max_position_embeddings", 512) or 512)


def _text(model: Path, target: Target, out: Path, shapes: Shapes) -> str:
    choice = choose(target, shapes)
    longest = _longest(shapes)
    length = min(512, longest)
    samples = _samples(shapes, length)
    key = "gguf" if model.is_file() else "path"
    prefill = ", ".join(str(n) for n in (128, 512) if n <= longest // 2) or str(longest // 4)
    exports = "\n".join(f"  - {line}" for line in choice.exports)
    gates = "\n".join(f"  {line}" for line in choice.gates)
    return f"""\
{_head(model, target, out, shapes, choice.why)}model:
  {key}: {_place(model, out)}
  # hub_name: owner/name   # on the Hugging Face Hub, for the model card's `base_model`
calibration:
  source: self         # text that the model writes; `file` with `file: my.txt` for your own
  samples: {samples}          # windows of `length` tokens; at least twice the widest layer's inputs
  length: {length}
compress:
  method: kfac_svd     # `svdexport methods` lists the others
  budget:
    param_ratio: {choice.param_ratio}   # kept share of the parameters: less is faster and worse
  allocate: greedy     # ranks by predicted loss, over all layers
  rank_multiple: {choice.rank_multiple}
export:
{exports}
evaluate:              # without `text: my.txt`: held-out text that the model wrote
  context: {length}
  windows: 8
speed:
  prefill: [{prefill}]
  decode: 64
baselines:
  plain: full          # the dense model, plainly quantised to this size: is that better?
gates:                 # a run that fails one publishes nothing (docs/verdict.md)
  max_perplexity_ratio: 2.0
{gates}
"""
