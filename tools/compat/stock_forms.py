"""Show which GGUF forms an unchanged llama.cpp runs, and that what it runs is right.

Writes a model in each form with the installed svdexport, then loads every file in the unchanged
library (built by ``tools/llama_cpp/build.py --stock``) in a process of its own, and compares its
logits with torch's. Prints a Markdown table.

    python tools/compat/stock_forms.py --source MODEL --checkpoint COMPRESSED
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A form to try; ``weights``: whose logits it should have."""

    form: str
    settings: dict[str, str]
    weights: str


CASES = [
    Case("pairs", {"type": "Q8_0"}, "compressed"),
    Case("stock", {"type": "F32", "form": "stock"}, "compressed"),
    Case("stock", {"type": "Q8_0", "form": "stock"}, "compressed"),
    Case("stock_lora", {"type": "F32", "form": "stock_lora"}, "original"),
    Case(
        "stock_lora",
        {"type": "Q4_0", "type_a": "F16", "type_b": "F16", "form": "stock_lora"},
        "original",
    ),
    Case("dense", {"type": "Q4_0"}, "original"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="svdexport compress's output"
    )
    parser.add_argument(
        "--also",
        type=Path,
        nargs="*",
        default=[],
        help="exported GGUF files, adapters beside them, to compare with the original",
    )
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_here(*args.worker, args.source)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(args.source, args.checkpoint, args.also, Path(scratch))


def compare(source: Path, checkpoint: Path, also: list[Path], scratch: Path) -> None:
    from svdexport.checkpoint import Checkpoint
    from svdexport.export import ExportRequest, exporter
    from svdexport.models.loader import load_model, load_tokenizer
    from svdexport.recipe import GgufExport
    from svdexport.runtimes.gguf_file import adapter_of
    from svdexport.runtimes.torch_rt import TorchRuntime

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokens = np.array(load_tokenizer(source)(text)["input_ids"][:TOKENS])
    np.save(scratch / "tokens.npy", tokens)
    expected = {
        "compressed": TorchRuntime(checkpoint, 1, load_model(checkpoint)).logits(tokens),
        "original": TorchRuntime(source, 1, load_model(source)).logits(tokens),
    }
    package = stock_package(scratch)
    print("| form | type | bytes | unchanged llama.cpp | top token as torch's | difference |")
    print("|---|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        opened = Checkpoint.open(source if case.form == "dense" else checkpoint)
        spec = GgufExport.model_validate(case.settings)
        out = scratch / f"{number}.gguf"
        made = exporter("gguf").export(
            ExportRequest(opened, source, None, out, scratch / "base", spec)
        )
        found = run_stock(package, out, scratch)
        print_row([case.form, spec.label, f"{made.bytes:,}"], found, case.weights, expected)
    for path in also:
        size = sum(p.stat().st_size for p in (path, adapter_of(path)) if p is not None)
        found = run_stock(package, path, scratch)
        print_row(["given", path.stem, f"{size:,}"], found, "original", expected)


def print_row(
    row: list[str],
    found: tuple[str, np.ndarray | None],
    weights: str,
    expected: dict[str, np.ndarray],
) -> None:
    """One line of the table: what the library says, and how near its logits are to torch's."""
    said, logits = found
    if logits is None:
        row += [said, "-", "-"]
    else:
        meant = expected[weights]
        error = np.sqrt(((logits - meant) ** 2).mean()) / meant.std()
        same = (logits.argmax(1) == meant.argmax(1)).mean()
        row += [said, f"{same:.1%} ({weights})", f"{error:.1e}"]
    print("| " + " | ".join(row) + " |", flush=True)


def stock_package(scratch: Path) -> Path:
    """A folder with the package llama_cpp around the unchanged library."""
    build = [sys.executable, str(ROOT / "tools" / "llama_cpp" / "build.py"), "--stock"]
    done = subprocess.run(build, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        raise SystemExit("the unchanged library cannot be built")
    wheel = done.stdout.strip()
    folder = scratch / "stock"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_stock(package: Path, model: Path, scratch: Path) -> tuple[str, np.ndarray | None]:
    """What the unchanged library says of a file, and its logits if it runs."""
    logits = scratch / "logits.npy"
    logits.unlink(missing_ok=True)
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--source",
            scratch / "tokens.npy",
            "--checkpoint",
            scratch,
            "--worker",
            model,
            logits,
        ],
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if logits.exists():
        return "runs", np.load(logits)
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return "refuses: " + said.replace("|", "\\|"), None


def run_here(model: Path, out: Path, tokens: Path) -> None:
    """In the process that has the unchanged library: logits, or its own words on stderr."""
    from svdexport.errors import InputError
    from svdexport.runtimes import ggml, llama_cpp_rt

    assert not ggml.supports_low_rank(), "this is not the unchanged library"
    llama_cpp_rt.supports_low_rank = lambda: True  # let llama.cpp itself speak
    try:
        runtime = llama_cpp_rt.LlamaCppRuntime(model, threads=1, context=TOKENS, exact=True)
    except InputError as error:
        raise SystemExit(str(error).partition("cannot load it: ")[2]) from None
    np.save(out, runtime.logits(np.load(tokens)))


if __name__ == "__main__":
    main()
