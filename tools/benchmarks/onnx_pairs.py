"""Speed of low-rank pairs against the dense model at the same precision, in onnxruntime on the CPU.

Writes a Llama with random weights (speed does not depend on their values), dense and as pairs that
keep a share of the linears' parameters, exports both with svdexport (the dense one with q, k and v
fused, the best the onnxruntime-genai builder offers) and times prefill and decode in turn.
Efficiency = speedup / (bytes of the dense linears / bytes of the pairs), the LM head in both.

    python tools/benchmarks/onnx_pairs.py --precisions fp32,int8,int4,int2 --threads 2 --rounds 9

Needs idle cores: rounds in which others took a core are marked; too many leave no verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
MULTIPLE = 32


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


def write(folder: Path, shape: Shape, kept: float | None) -> Checkpoint:
    """A checkpoint folder in float16; ``kept`` None for the dense one."""
    folder.mkdir(parents=True)
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
                rank = int(kept * rows * columns / (rows + columns) / MULTIPLE) * MULTIPLE
                add(f"{base}.{group[0]}.lr_a.weight", rank, columns)
            for member in group:
                name = f"{base}.{member}"
                if kept is None:
                    add(f"{name}.weight", *linears[member])
                else:
                    add(f"{name}.lr_b.weight", linears[member][0], rank)
                    low_rank[name] = PairSpec(rank, f"{base}.{group[0]}")
    tensors |= {f"{name}.weight": torch.ones(shape.width).half() for name in norms}
    save_file(tensors, folder / "model.safetensors")
    config = shape.config()
    if low_rank:
        config["quantization_config"] = low_rank_config(low_rank)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def linear_bytes(path: Path) -> int:
    """Bytes of the weights that every step reads."""
    found = inspect(path)
    return sum(entry["bytes"] for entry in found["linears"] + found["other"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="six-layers")
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--precisions", default="fp32,int8,int4,int2")
    parser.add_argument("--block-size", type=int, help="default: 32, and 128 for int2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runtime", choices=("genai", "plain"), default="genai")
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape, reports = SHAPES[args.shape], {}
    print(f"{args.shape}, kept {args.kept}, {args.threads} threads, {args.runtime}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        folders = {
            "dense": write(work / "dense", shape, None),
            "pairs": write(work / "pairs", shape, args.kept),
        }
        for precision in args.precisions.split(","):
            reports[precision] = _one(args, precision, folders, work)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))


def _one(
    args: argparse.Namespace, precision: str, folders: dict[str, Checkpoint], work: Path
) -> dict[str, Any]:
    block = {} if args.block_size is None else {"block_size": args.block_size}
    spec = OnnxExport.model_validate({"precision": precision, **block})
    source = folders["dense"].path
    runtimes: list[Runtime] = []
    sizes = []
    for name, checkpoint in folders.items():
        out = work / f"{name}-{precision}"
        export(ExportRequest(checkpoint, source, None, out, work, spec))
        sizes.append(linear_bytes(out))
        opener = GenaiRuntime if args.runtime == "genai" else OrtRuntime
        runtimes.append(opener(out, threads=args.threads))
    settings = SpeedSettings(threads=args.threads, rounds=args.rounds)
    report = measure(runtimes, settings)
    share = sizes[1] / sizes[0]
    for timing in report.artifacts[1].timings:
        speedup = timing.speedup
        assert speedup is not None
        print(
            f"{precision:5} {timing.metric:12} {sizes[0] / 1e6:6.1f} -> {sizes[1] / 1e6:6.1f} MB  "
            f"{timing.tps:8.1f} t/s  speedup {speedup.median:.2f} "
            f"({speedup.low:.2f} to {speedup.high:.2f})  efficiency {speedup.median * share:.2f}  "
            f"{timing.verdict}, {timing.disturbed_rounds} disturbed",
            flush=True,
        )
    for runtime in runtimes:
        runtime.close()
    return asdict(report)


if __name__ == "__main__":
    sys.exit(main())
