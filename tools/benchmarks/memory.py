"""Time and peak memory of compressing and exporting a random Llama of a given shape.

    python tools/benchmarks/memory.py make 1.1B --folder big/m        # bf16, written as a stream
    python tools/benchmarks/memory.py plan --folder big/m
    python tools/benchmarks/memory.py compress --folder big/m --method svd_llm [--blocks 2]
    python tools/benchmarks/memory.py pairs --folder big/m            # random pairs, 80 % kept
    python tools/benchmarks/memory.py export --folder big/m --format gguf

``compress`` runs the command line in a process of its own, with streamed weights; ``--blocks``
stops it once that many blocks have their factors. ``export`` writes the checkpoint that a whole
``compress``, or ``pairs``, has left, without the checks that follow. Each prints one JSON object.
``resident`` is the kernel's high-water mark (VmHWM), which counts mapped pages of files;
``anonymous`` is the largest sample (20 a second) of what no file backs; ``children_resident`` is
that of processes that it started, such as llama.cpp's converter.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


def make(folder: Path, shape: str, layers: int | None, sparse: bool) -> dict[str, Any]:
    """Write the model, one block in memory at a time; all blocks hold the same random values."""
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

    drawn: dict[str, torch.Tensor] = {}

    def values(name: str, size: tuple[int, ...]) -> torch.Tensor:
        kind = re.sub(r"\d+", "N", name)
        if kind not in drawn:
            random_values = torch.randn(size, generator=generator) / math.sqrt(size[-1])
            drawn[kind] = (random_values if len(size) > 1 else torch.ones(size)).bfloat16()
        return drawn[kind]

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        weight_map.update(dict.fromkeys(shapes, file))
        if sparse:
            _sparse(folder / file, shapes)
            return
        with SafetensorsWriter(folder / file) as writer:
            for name, size in shapes.items():
                writer.add(name, values(name, size))

    width, vocab = config["hidden_size"], config["vocab_size"]
    ends = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = (vocab, width)
    write("ends.safetensors", ends)
    for layer in range(config["num_hidden_layers"]):
        write(f"layer-{layer:02d}.safetensors", _block(layer, config))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"folder": str(folder), "shape": shape, "bytes": size}


def _sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Headers with zeros as a hole in the file, which take no room: enough for ``plan``."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


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
    """A small sentencepiece one, which llama.cpp's converter takes for any Llama."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_text(2000)]),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def _text(count: int) -> str:
    words = random.Random(0)
    return "".join(words.choice("abcdefgh ijklmnop ") for _ in range(count))


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
    (place / "text.txt").write_text(_text(8 * (options.samples * options.length + 64)))
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


GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def pairs(options: argparse.Namespace) -> dict[str, Any]:
    """A compressed checkpoint with random pairs, where only the exporters are measured."""
    import torch

    from svdexport.checkpoint import Checkpoint, PairSpec
    from svdexport.export.checkpoint import assembled, compressed_config, write_checkpoint

    source = Checkpoint.open(options.folder)
    config = source.config
    low_rank: dict[str, PairSpec] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config["num_hidden_layers"]):
        block = {k.removesuffix(".weight"): v for k, v in _block(layer, config).items()}
        shapes |= {name: (v[0], v[1]) for name, v in block.items() if len(v) == 2}
        for group in GROUPS:
            names = [f"model.layers.{layer}.{name}" for name in group]
            rows, columns = sum(shapes[name][0] for name in names), shapes[names[0]][1]
            rank = int(0.8 * rows * columns / (rows + columns)) // 32 * 32
            low_rank |= {name: PairSpec(rank, names[0]) for name in names}

    def made() -> Iterator[dict[str, torch.Tensor]]:
        for name, spec in low_rank.items():
            rows, columns = shapes[name]
            found = {f"{name}.lr_b.weight": torch.randn(rows, spec.rank) / spec.rank**0.5}
            if spec.group == name:
                found[f"{name}.lr_a.weight"] = torch.randn(spec.rank, columns) / columns**0.5
            yield found

    out = options.folder.parent / ".out.work" / "checkpoint"
    changed = compressed_config(config, low_rank)
    write_checkpoint(out, options.folder, changed, assembled(source, low_rank, made()))
    return {"checkpoint": str(out)}


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
    parser.add_argument("what", choices=["make", "plan", "compress", "pairs", "export", "worker"])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="tiny")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sparse", action="store_true", help="make: headers only, for plan")
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
        print(json.dumps(make(options.folder, options.shape, options.layers, options.sparse)))
    else:
        commands = {"plan": plan, "compress": compress, "pairs": pairs, "export": export}
        print(json.dumps(commands[options.what](options)))


if __name__ == "__main__":
    main()
