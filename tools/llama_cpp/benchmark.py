"""Speed of low-rank pairs against the dense model of the same weight type, in llama.cpp on the CPU.

Writes a Llama with random weights (speed does not depend on their values) dense and as pairs, has
llama.cpp quantise both, and times prefill and decode in turn, round by round, in one process.
Prints for each type the speedup and the efficiency = speedup / (dense bytes / low-rank bytes), by
the bytes of the files ("eff.") and by those that a token reads ("read"): of an embedding that is
not the head too, it reads one row. "meet" is what it costs that the threads wait for each other
after an operation, in microseconds, median and range over the rounds: the same two cores of a
server can be near each other in one minute and far in the next, and pairs have more operations.

    python tools/llama_cpp/benchmark.py --types F16,Q8_0 --threads 2 --rounds 9

Needs the packages gguf and numpy beside the wheel that build.py makes, and idle cores. With
`--threads 1 --clock cpu` the process's own time is taken, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

GROUPS = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up": ("ffn_gate", "ffn_up")}
CONTEXT = 1024
# a rank that is no multiple of this takes a slower path: F16's dot product has a step of 64 numbers
# (with AVX-512) and a scalar rest; K-quants have blocks of 256
MULTIPLE = {"F16": 64, "Q8_0": 32, "Q4_0": 32, "IQ4_NL": 32}
MULTIPLE |= dict.fromkeys(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"), 256)


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes, and the linears of a layer as (n_out, n_in)."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        kv = self.width // self.heads * self.kv_heads
        return {
            "attn_q": (self.width, self.width),
            "attn_k": (kv, self.width),
            "attn_v": (kv, self.width),
            "attn_output": (self.width, self.width),
            "ffn_gate": (self.hidden, self.width),
            "ffn_up": (self.hidden, self.width),
            "ffn_down": (self.width, self.hidden),
        }


SHAPES = {
    "six-layers": Shape(6, 2048, 5632, 32, 32, 4096),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000),
}


def rank(n_out: int, n_in: int, kept: float, multiple: int) -> int:
    """The rank, a multiple of `multiple`, whose pair has nearest to `kept` of the parameters."""
    return max(multiple, round(kept * n_out * n_in / (n_out + n_in) / multiple) * multiple)


def pair_shapes(
    shape: Shape, kept: float, multiple: int, shared: bool
) -> dict[str, tuple[int, int]]:
    """The factors of one layer: name -> (rows, row length)."""
    linears = shape.linears()
    groups = [(name, members) for name, members in GROUPS.items() if shared]
    grouped = {member for _, members in groups for member in members}
    groups += [(name, (name,)) for name in linears if name not in grouped]
    out: dict[str, tuple[int, int]] = {}
    for name, members in groups:
        n_in = linears[members[0]][1]
        k = rank(sum(linears[member][0] for member in members), n_in, kept, multiple)
        out[f"{name}.lr_a"] = (k, n_in)
        out[f"{name}.lr_b"] = (sum(linears[member][0] for member in members), k)
    return out


def write(path: Path, shape: Shape, layer: dict[str, tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)

    def add(name: str, rows: int, length: int) -> None:
        values = rng.random((rows, length), dtype=np.float32) - np.float32(0.5)
        writer.add_tensor(
            f"{name}.weight", (values * np.float32(2 / length**0.5)).astype(np.float16)
        )

    add("token_embd", shape.vocab, shape.width)
    if not shape.tied:
        add("output", shape.vocab, shape.width)
    writer.add_tensor("output_norm.weight", np.ones(shape.width, dtype=np.float32))
    for i in range(shape.layers):
        for name, (rows, length) in layer.items():
            add(f"blk.{i}.{name}", rows, length)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(shape.width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def quantise(source: Path, kind: str) -> Path:
    """The file with every matrix in the type `kind`, made by llama.cpp."""
    if kind == "F16":
        return source
    out = source.with_suffix(f".{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    name = f"LLAMA_FTYPE_MOSTLY_{kind}"
    params.ftype = getattr(llama_cpp, name, None) or getattr(llama_cpp, f"{name}_S")
    params.pure = True
    part = out.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source.name} to {kind}")
    return part.rename(out)


def bytes_read(path: Path) -> int:
    """Bytes of the matrices that a decoded token reads whole."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    rows_only = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - rows_only


class Model:
    """A file, loaded, with one context; times in seconds."""

    def __init__(self, path: Path, threads: int, clock: Callable[[], float]) -> None:
        self.model = model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params) if model else None
        if not self.context:
            raise SystemExit(
                f"llama.cpp cannot load {path} (pairs need the library that build.py makes)"
            )
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.bytes = path.stat().st_size
        self.read = bytes_read(path)
        self.clock = clock

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)

    def time(self, prompt: int, steps: int) -> tuple[float, float]:
        """Seconds for a prompt, and for `steps` tokens after it."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = [(11 * i + 5) % self.vocab for i in range(prompt)]
        start = self.clock()
        self._decode(tokens)
        middle = self.clock()
        for i in range(steps):
            self._decode([(7 * i + 3) % self.vocab])
        return middle - start, self.clock() - middle


class Meeting:
    """What an operation costs that has nothing to do but to let the threads meet after it."""

    NODES = 2000

    class _Memory(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_size_t),
            ("buffer", ctypes.c_void_p),
            ("no_alloc", ctypes.c_bool),
        )

    def __init__(self, threads: int) -> None:
        self.threads = threads
        ggml = self.ggml = llama_cpp.llama_cpp._lib
        ggml.ggml_init.argtypes = [self._Memory]
        for name in ("ggml_init", "ggml_new_tensor_1d", "ggml_add", "ggml_new_graph_custom"):
            getattr(ggml, name).restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(ggml.ggml_init(self._Memory(1 << 22, None, False)))
        f32, new = 0, ggml.ggml_new_tensor_1d
        one = ctypes.c_void_p(new(self.context, f32, ctypes.c_int64(1)))
        last = one
        for _ in range(self.NODES):
            last = ctypes.c_void_p(ggml.ggml_add(self.context, last, one))
        size = ctypes.c_size_t(2 * self.NODES)
        self.graph = ctypes.c_void_p(ggml.ggml_new_graph_custom(self.context, size, False))
        ggml.ggml_build_forward_expand(self.graph, last)
        self.microseconds()  # starts the threads

    def microseconds(self) -> float:
        start = time.perf_counter()
        if self.ggml.ggml_graph_compute_with_ctx(self.context, self.graph, self.threads):
            raise SystemExit("ggml cannot compute a graph of additions")
        return (time.perf_counter() - start) / self.NODES * 1e6

    def close(self) -> None:
        self.ggml.ggml_free(self.context)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return statistics.median(ratios), float(low), float(high)


def compare(
    dense: Model, pairs: Model, threads: int, rounds: int, prompt: int, steps: int
) -> dict[str, object]:
    for model in (dense, pairs):
        model.time(prompt, 4)
    times, meets = [], []
    meeting = Meeting(threads)
    for i in range(rounds):  # neither always has the caches as the other leaves them
        order = (dense, pairs) if i % 2 == 0 else (pairs, dense)
        taken = {id(model): model.time(prompt, steps) for model in order}
        times.append((taken[id(dense)], taken[id(pairs)]))
        meets.append(meeting.microseconds())
    meeting.close()
    shrink, read = dense.bytes / pairs.bytes, dense.read / pairs.read
    result: dict[str, object] = {"bytes_ratio": shrink, "read_ratio": read, "meet": meets}
    for i, what in enumerate(("prefill", "decode")):
        median, low, high = interval([d[i] / p[i] for d, p in times])
        best = min(d[i] for d, _ in times) / min(p[i] for _, p in times)
        result[what] = {
            "speedup": median,
            "low": low,
            "high": high,
            "speedup_of_best": best,
            "efficiency": median / shrink,
            "efficiency_of_read": median / read,
            "seconds": [[d[i], p[i]] for d, p in times],
        }
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="six-layers")
    parser.add_argument("--types", default="F16,Q8_0,Q4_0,Q4_K")
    parser.add_argument("--kept", type=float, default=0.5, help="share of the linears' parameters")
    parser.add_argument("--multiple", type=int, help="of the ranks, else what suits the type")
    parser.add_argument(
        "--shared", action="store_true", help="q, k, v as one pair, gate and up as one"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those found")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    args = parser.parse_args()
    args.types = args.types.split(",")
    if unknown := [kind for kind in args.types if kind not in MULTIPLE]:
        parser.error(f"--types {unknown[0]}: choose from {', '.join(MULTIPLE)}")
    if args.prompt + args.steps > CONTEXT:
        parser.error(f"--prompt and --steps: at most {CONTEXT} tokens together")
    return args


def main() -> int:
    args = arguments()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    shape = SHAPES[args.shape]
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    results: dict[str, object] = {}
    print(f"{args.shape}, kept {args.kept}, {args.threads} threads, {args.clock} time")
    head = "type   bytes read   prefill [95 %]        eff. read  decode  [95 %]        eff. read"
    print(f"{head}  meet")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in args.types:
            multiple = args.multiple or MULTIPLE.get(kind, 32)
            layer = pair_shapes(shape, args.kept, multiple, args.shared)
            name = f"{args.shape}-{args.kept}-{multiple}{'-fused' if args.shared else ''}"
            files = {f"{args.shape}-dense": shape.linears(), name: layer}
            models = []
            for stem, tensors in files.items():
                source = folder / f"{stem}.gguf"
                if not source.exists():
                    write(source, shape, tensors)
                made = source if kind == "F16" else source.with_suffix(f".{kind}.gguf")
                made = made if made.exists() else quantise(source, kind)
                models.append(Model(made, args.threads, clock))
            result = compare(*models, args.threads, args.rounds, args.prompt, args.steps)
            results[kind] = result
            for model in models:
                model.close()
            line = f"{kind:6} {result['bytes_ratio']:.2f}x {result['read_ratio']:.2f}x"
            for what in ("prefill", "decode"):
                r = result[what]
                assert isinstance(r, dict)
                speed = f"{r['speedup']:.2f}x  [{r['low']:.2f}, {r['high']:.2f}]"
                line += f"  {speed}  {r['efficiency']:.2f} {r['efficiency_of_read']:.2f}"
            meets = result["meet"]
            assert isinstance(meets, list)
            middle = statistics.median(meets)
            print(f"{line}  {middle:.2f} ({min(meets):.2f} to {max(meets):.2f})", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
