"""Speed of low-rank pairs against the dense model at the same precision, in onnxruntime on the CPU.

Writes a Llama with random weights (speed does not depend on their values), dense and as pairs that
keep a share of the linears' parameters, exports both with svdexport (the dense one with q, k and v
fused, the best the onnxruntime-genai builder offers) and times prefill and decode in turn.
Efficiency = speedup / (bytes of the dense linears / bytes of the pairs), the LM head in both. Its
limit is what it would be if products took time by their bytes: attention and norms, which low rank
does not touch, take what onnxruntime's profiler said of the dense graph.

    python tools/benchmarks/onnx_pairs.py --precisions fp32,int8,int4,int2 --threads 2 --rounds 9

Needs idle cores: rounds in which others took a core are marked; too many leave no verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from onnx_profile import PROMPT, profile, split
from safetensors.torch import save_file

from svdexport.checkpoint import Checkpoint, PairSpec, low_rank_config
from svdexport.core.measures import SpeedSettings
from svdexport.export.base import ExportRequest
from svdexport.export.onnx import export
from svdexport.recipe import OnnxExport
from svdexport.runtimes.base import Runtime
from svdexport.runtimes.genai_rt import GenaiRuntime
from svdexport.runtimes.inspect_onnx import inspect
from svdexport.runtimes.ort_rt import OrtRuntime
from svdexport.verify.speed import measure

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
SHARED = (QKV, ("self_attn.o_proj",), MLP, ("mlp.down_proj",))
BLOCKS = {"fp32": 32, "int8": 32, "int4": 32, "int2": 128}
"""Block of each precision where none is asked for."""
MULTIPLES = {"fp32": 32, "int8": 128, "int4": 128, "int2": 512}
"""Inputs that MatMulNBits takes at once with AVX-512; ranks are multiples of it."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of a block: (outputs, inputs)."""
        kv = self.width // self.heads * self.kv_heads
        outputs = (self.width, kv, kv)
        return {
            **{name: (rows, self.width) for name, rows in zip(QKV, outputs, strict=True)},
            "self_attn.o_proj": (self.width, self.width),
            **dict.fromkeys(MLP, (self.hidden, self.width)),
            "mlp.down_proj": (self.width, self.hidden),
        }


SHAPES = {
    "six-layers": Shape(6, 2048, 5632, 32, 32, 4096),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000),
}


def write(folder: Path, shape: Shape, kept: float | None, multiple: int = 1) -> Checkpoint:
    """A checkpoint folder in float16; ``kept`` None for the dense one.

    Ranks are the nearest ``multiple`` to what keeps that share.
    """
    if folder.exists():
        return Checkpoint.open(folder)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    linears, tensors = shape.linears(), dict[str, torch.Tensor]()
    low_rank: dict[str, PairSpec] = {}

    def add(name: str, *size: int) -> None:
        tensors[name] = (torch.randn(size) * 0.02).half()

    add("model.embed_tokens.weight", shape.vocab, shape.width)
    if not shape.tied:
        add("lm_head.weight", shape.vocab, shape.width)
    norms = ["model.norm"]
    for layer in range(shape.layers):
        base = f"model.layers.{layer}"
        norms += [f"{base}.input_layernorm", f"{base}.post_attention_layernorm"]
        for group in SHARED:
            rows, columns = sum(linears[m][0] for m in group), linears[group[0]][1]
            rank = 0
            if kept is not None:
                rank = round(kept * rows * columns / (rows + columns) / multiple) * multiple
                add(f"{base}.{group[0]}.lr_a.weight", rank, columns)
            for member in group:
                name = f"{base}.{member}"
                if kept is None:
                    add(f"{name}.weight", *linears[member])
                else:
                    add(f"{name}.lr_b.weight", linears[member][0], rank)
                    low_rank[name] = PairSpec(rank, f"{base}.{group[0]}")
    tensors |= {f"{name}.weight": torch.ones(shape.width).half() for name in norms}
    save_file(tensors, part / "model.safetensors")
    config = shape.config()
    if low_rank:
        config["quantization_config"] = low_rank_config(low_rank)
    (part / "config.json").write_text(json.dumps(config))
    part.rename(folder)
    return Checkpoint.open(folder)


def linear_bytes(path: Path) -> int:
    """Bytes of the weights that every step reads."""
    found = inspect(path)
    return sum(entry["bytes"] for entry in found["linears"] + found["other"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="six-layers")
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument(
        "--precisions", default="fp32,int8,int4,int2", help="int8:128 for int8 in blocks of 128"
    )
    parser.add_argument("--multiple", type=int, help="of ranks, else what suits the precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill", default="128,512")
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--work", type=Path, help="keep the models here, or take them from here")
    parser.add_argument("--profile", action="store_true", help="time by operator, and the limit")
    parser.add_argument("--runtime", choices=("genai", "plain"), default="genai")
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape, reports = SHAPES[args.shape], {}
    print(f"{args.shape}, kept {args.kept}, {args.threads} threads, {args.runtime}", flush=True)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dense = write(work / f"{args.shape}-dense", shape, None)
        for label in args.precisions.split(","):
            precision, _, asked = label.partition(":")
            block = int(asked or BLOCKS[precision])
            multiple = args.multiple or MULTIPLES[precision]
            name = f"{args.shape}-{args.kept:g}-{multiple}"
            pairs = write(work / name, shape, args.kept, multiple)
            spec = OnnxExport.model_validate({"precision": precision, "block_size": block})
            reports[label] = _one(args, label, spec, {"dense": dense, "pairs": pairs}, work)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))


def _one(
    args: argparse.Namespace,
    label: str,
    spec: OnnxExport,
    folders: dict[str, Checkpoint],
    work: Path,
) -> dict[str, Any]:
    source = folders["dense"].path
    runtimes: list[Runtime] = []
    sizes = []
    for checkpoint in folders.values():
        out = work / f"{checkpoint.path.name}-{label.replace(':', '-')}"
        if not out.exists():
            export(ExportRequest(checkpoint, source, None, out, work, spec))
        sizes.append(linear_bytes(out))
        opener = GenaiRuntime if args.runtime == "genai" else OrtRuntime
        runtimes.append(opener(out, threads=args.threads))
    lengths = tuple(int(length) for length in args.prefill.split(","))
    settings = SpeedSettings(args.threads, args.rounds, lengths, args.decode)
    report = measure(runtimes, settings)
    share = sizes[1] / sizes[0]
    for timing in report.artifacts[1].timings:
        speedup = timing.speedup
        assert speedup is not None
        print(
            f"{label:8} {timing.metric:12} {sizes[0] / 1e6:6.1f} -> {sizes[1] / 1e6:6.1f} MB  "
            f"{timing.tps:8.1f} t/s  speedup {speedup.median:.2f} "
            f"({speedup.low:.2f} to {speedup.high:.2f})  efficiency {speedup.median * share:.2f}  "
            f"{timing.verdict}, {timing.disturbed_rounds} disturbed",
            flush=True,
        )
    for runtime in runtimes:
        runtime.close()
    found = asdict(report)
    if args.profile:
        metrics = [(f"prefill_{length}", length, 0) for length in lengths]
        metrics += [("decode", PROMPT, args.decode)] if args.decode else []
        found["profile"] = {
            name: _profiled(
                label,
                name,
                [runtime.path for runtime in runtimes],
                share,
                args.threads,
                tokens,
                steps,
            )
            for name, tokens, steps in metrics
        }
    return found


def _profiled(
    label: str, name: str, paths: list[Path], share: float, threads: int, tokens: int, steps: int
) -> list[dict[str, float]]:
    """Print and give the time by operator, dense and pairs."""
    times = [profile(path, threads, tokens, steps) for path in paths]
    (dense, rest), (pairs, rest_pairs) = (split(found) for found in times)
    limit = share * (dense + rest) / (share * dense + rest)
    print(
        f"{label:8} {name:12} ms in products {dense * 1e3:.2f} -> {pairs * 1e3:.2f}, efficiency "
        f"{dense * share / pairs:.2f}; others {rest * 1e3:.2f} -> {rest_pairs * 1e3:.2f}; "
        f"limit {limit:.2f}",
        flush=True,
    )
    return [dict(found) for found in times]


if __name__ == "__main__":
    sys.exit(main())
