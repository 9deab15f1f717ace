"""Where an ONNX decoder's time goes, operator by operator, by onnxruntime's profiler.

    python tools/benchmarks/onnx_profile.py FOLDER [FOLDER ...] --prefill 128,512 --decode 16

Prints milliseconds a prompt and a token. Products are the operators that read a weight of a linear.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.runtimes.ort_rt import OrtRuntime

PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits")
PROMPT = 32
REPEATS = 3


class ProfiledRuntime(OrtRuntime):
    """A plain session that writes onnxruntime's trace into a folder."""

    def __init__(self, path: Path, *, threads: int, trace: Path) -> None:
        self._trace = trace
        super().__init__(path, threads=threads)

    def _options(self) -> Any:
        options = super()._options()
        options.enable_profiling = True
        options.profile_file_prefix = str(self._trace / "trace")
        return options

    def times(self, skip: int, nodes: bool) -> Counter[str]:
        """Operator -> seconds in its kernels, without the session's first ``skip`` runs.

        ``nodes``: the nodes' names in place of the operators', the like of all layers as one.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        runs = sorted(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
        start = runs[skip - 1] if skip else 0
        found: Counter[str] = Counter()
        for event in events:
            if event["name"].endswith("_kernel_time") and event["ts"] >= start:
                node = re.sub(r"layers\.\d+", "layers.N", event["name"])
                name = node.removesuffix("_kernel_time") if nodes else event["args"]["op_name"]
                found[name] += event["dur"] / 1e6
        return found


def profile(
    folder: Path, threads: int, tokens: int, steps: int = 0, nodes: bool = False
) -> Counter[str]:
    """Operator -> seconds of a prompt of ``tokens``; or of a step, over ``steps`` after it."""
    prompt = np.random.default_rng(0).integers(3, 256, tokens)
    with tempfile.TemporaryDirectory() as trace:
        runtime = ProfiledRuntime(folder, threads=threads, trace=Path(trace))
        if steps:
            runtime.decode(prompt, steps)
            found, count = runtime.times(1, nodes), steps
        else:
            for _ in range(REPEATS + 1):
                runtime.prefill(prompt)
            found, count = runtime.times(1, nodes), REPEATS
        runtime.close()
    return Counter({name: seconds / count for name, seconds in found.items()})


def split(times: Counter[str]) -> tuple[float, float]:
    """Seconds in products, and in everything else."""
    products = sum(times[name] for name in PRODUCTS)
    return products, sum(times.values()) - products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prefill", default="128,512")
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", action="store_true", help="by node, the layers as one")
    args = parser.parse_args()
    metrics = [(f"prefill_{n}", int(n), 0) for n in args.prefill.split(",")]
    metrics += [("decode", PROMPT, args.decode)] if args.decode else []
    for folder in args.folders:
        for name, tokens, steps in metrics:
            times = profile(folder, args.threads, tokens, steps, args.nodes)
            told = "  ".join(f"{op} {s * 1e3:.2f}" for op, s in times.most_common(12))
            print(f"{folder.name} {name}: {sum(times.values()) * 1e3:.2f} ms  {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
