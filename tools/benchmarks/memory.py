"""Time and peak memory of compressing and exporting a random Llama of a given shape.

    python tools/benchmarks/memory.py make 1.1B --folder big/m        # bf16, written as a stream
    python tools/benchmarks/memory.py plan --folder big/m
    python tools/benchmarks/memory.py compress --folder big/m --method svd_llm [--blocks 2]
    python tools/benchmarks/memory.py export --folder big/m --format gguf

``compress`` runs the command line in a process of its own, with streamed weights; ``--blocks``
stops it once that many blocks have their factors. ``export`` writes the checkpoint that a whole
``compress`` has left, without the checks that follow. Each prints one JSON object. ``resident`` is
the kernel's high-water mark (VmHWM), which counts mapped pages of files; ``anonymous`` is the
largest sample (20 a second) of what is not backed by a file; ``children`` are the same of processes
that it started, such as llama.cpp's converter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
             "tie_word_embeddings": True},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
RECIPE = """\
schema: 1
model: {{path: {model}}}
calibration: {{source: file, file: text.txt, samples: {samples}, length: {length}, batch: {batch}}}
compress: {{method: {method}, budget: {{param_ratio: 0.8}}, stream: {stream}}}
export: [{{format: gguf, type: Q8_0}}, {{format: onnx, precision: int8}}]
evaluate: {{text: text.txt, context: 64, windows: 1}}
speed: {{threads: {threads}}}
"""


def make(folder: Path, shape: str, layers: int | None) -> dict[str, Any]:
    """Write the model, one tensor in memory at a time; all blocks hold the same random values."""
    import torch

    from svdexport.export.safetensors_write import SafetensorsWriter

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **SHAPES[shape],
    }
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        generator.manual_seed(seed)
        with SafetensorsWriter(folder / file) as writer:
            for name, size in shapes.items():
                values = torch.randn(size, generator=generator) / math.sqrt(size[-1])
                if len(size) == 1:
                    values = torch.ones(size)
                writer.add(name, values.bfloat16())
                weight_map[name] = file

    width, vocab = config["hidden_size"], config["vocab_size"]
    ends = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = (vocab, width)
    write("ends.safetensors", ends, 1)
    for layer in range(config["num_hidden_layers"]):
        write(f"layer-{layer:02d}.safetensors", _block(layer, config), 2)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"folder": str(folder), "shape": shape, "bytes": size}


def _block(layer: int, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.self_attn.q_proj.weight": (width, width),
        f"{prefix}.self_attn.k_proj.weight": (kv, width),
        f"{prefix}.self_attn.v_proj.weight": (kv, width),
        f"{prefix}.self_attn.o_proj.weight": (width, width),
        f"{prefix}.mlp.gate_proj.weight": (inner, width),
        f"{prefix}.mlp.up_proj.weight": (inner, width),
        f"{prefix}.mlp.down_proj.weight": (width, inner),
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.post_attention_layernorm.weight": (width,),
    }


def _tokenizer(folder: Path) -> None:
    """Bytes as tokens: what the text says does not matter here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def watch(command: list[str], done: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run a command to its end, or until ``done``; seconds and peaks in bytes."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    handle = psutil.Process(process.pid)
    peaks = {"resident": 0, "anonymous": 0, "children_resident": 0}
    stopped = False
    while process.poll() is None:
        peaks["resident"] = max(peaks["resident"], _status(process.pid, "VmHWM"))
        peaks["anonymous"] = max(peaks["anonymous"], _status(process.pid, "RssAnon"))
        try:
            children = handle.children(recursive=True)
        except psutil.NoSuchProcess:
            break
        resident = sum(_status(child.pid, "VmRSS") for child in children)
        peaks["children_resident"] = max(peaks["children_resident"], resident)
        if done():
            process.kill()
            stopped = True
            break
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    output = process.communicate()[0]
    if process.returncode and not stopped:
        raise SystemExit(f"exit {process.returncode}: {' '.join(command)}")
    return {"seconds": round(seconds, 1), **peaks, "stopped": stopped, "output": output[-300:]}


def _status(pid: int, key: str) -> int:
    """Bytes of one line of /proc/PID/status; 0 once the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith(key + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def recipe_of(options: argparse.Namespace) -> Path:
    """A recipe and a text beside the model."""
    place = options.folder.parent
    words = random.Random(0)
    count = options.samples * options.length
    text = "".join(words.choice("abcdefgh ijklmnop\n") for _ in range(count + 64))
    (place / "text.txt").write_text(text)
    recipe = place / "memory.yaml"
    recipe.write_text(RECIPE.format(model=options.folder.name, **vars(options)))
    return recipe


def plan(options: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(options)
    return watch([sys.executable, "-m", "svdexport", "plan", str(recipe), "--json"]) | {
        "output": ""
    }


def compress(options: argparse.Namespace) -> dict[str, Any]:
    out = options.folder.parent / "out"
    factors = options.folder.parent / ".out.work" / "factors"
    command = [sys.executable, "-m", "svdexport", "compress", str(recipe_of(options))]

    def enough() -> bool:
        return bool(options.blocks) and len(list(factors.glob("block_*"))) >= options.blocks

    found = watch([*command, "--out", str(out), "--json"], enough)
    times = sorted(path.stat().st_mtime for path in factors.glob("block_*"))
    between = [round(b - a, 1) for a, b in itertools.pairwise(times)]
    return found | {"method": options.method, "seconds_between_blocks": between}


def export(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "worker", "--folder", str(options.folder)]
    return watch([*command, "--format", options.format])


def worker(options: argparse.Namespace) -> None:
    """One exporter on the checkpoint that ``compress`` left."""
    from svdexport.checkpoint import Checkpoint
    from svdexport.export import ExportRequest, exporter
    from svdexport.recipe import GgufExport, OnnxExport

    place = options.folder.parent
    work = place / ".out.work"
    spec = GgufExport() if options.format == "gguf" else OnnxExport(precision="int8")
    out = place / f"exported.{options.format}"
    request = ExportRequest(
        Checkpoint.open(work / "checkpoint"), options.folder, None, out, work / "base", spec
    )
    print(exporter(options.format).export(request).bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "plan", "compress", "export", "worker"])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="tiny")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--method", default="svd_llm")
    parser.add_argument("--stream", default="always")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", choices=["gguf", "onnx"], default="gguf")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    if options.what == "worker":
        worker(options)
    elif options.what == "make":
        print(json.dumps(make(options.folder, options.shape, options.layers)))
    else:
        print(
            json.dumps(
                {"plan": plan, "compress": compress, "export": export}[options.what](options)
            )
        )


if __name__ == "__main__":
    main()
