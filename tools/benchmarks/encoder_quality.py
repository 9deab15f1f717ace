"""What compression does to a sentence encoder's embeddings, and to their order of similarity.

Compresses and exports the model at each kept share and compares the ONNX files with the dense
model in PyTorch, over pairs of neighbouring and of random sentences of a held-out text: the cosine
between dense and compressed embeddings, and Spearman's rank correlation of the pairs' similarities.

    python tools/fetch_encoder.py --link models/all-MiniLM-L6-v2
    python tools/benchmarks/encoder_quality.py models/all-MiniLM-L6-v2 --kept 0.8,0.6,0.4

Speed is `svdexport bench`'s protocol on the plain runtime, prefill alone; needs idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svdexport.checkpoint import Checkpoint
from svdexport.core.measures import SpeedSettings
from svdexport.export.base import ExportRequest
from svdexport.export.checkpoint import assembled, compressed_config, write_checkpoint
from svdexport.export.onnx import export
from svdexport.models.corpus import encoder_texts
from svdexport.models.loader import load_model, load_tokenizer, structure_of
from svdexport.pipeline import compress
from svdexport.pipeline.factors import factorize_blocks
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import OnnxExport, Recipe
from svdexport.runtimes.encoder_rt import EncoderRuntime
from svdexport.runtimes.sentence import SentenceEncoder, pooling_of
from svdexport.verify.embeddings import spearman
from svdexport.verify.speed import measure

BATCH = 16


def sentences(text: str, count: int) -> list[str]:
    """Sentences of 40 to 300 characters, in the order of the text, spread over it."""
    flat = re.sub(r"\s+", " ", text)
    found = [s for s in re.split(r"(?<=[.!?]) ", flat) if 40 <= len(s) <= 300]
    step = max(2, len(found) // (count // 2))
    return [s for i in range(0, len(found) - 1, step) for s in found[i : i + 2]][:count]


def batches(tokenizer: Any, lines: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    made = []
    for start in range(0, len(lines), BATCH):
        found = tokenizer(
            lines[start : start + BATCH],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="np",
        )
        made.append((found["input_ids"], found["attention_mask"]))
    return made


def recipe(args: argparse.Namespace, kept: float) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "model": {"path": args.model},
            "calibration": {
                "source": "file",
                "file": args.calibration,
                "samples": args.samples,
                "length": 128,
            },
            "compress": {
                "method": "svd_llm",
                "budget": {"param_ratio": kept},
                "allocate": args.allocate,
            },
            "export": [{"format": "checkpoint"}],
            "evaluate": {"text": args.text, "context": 128, "windows": 1},
        },
        strict=False,
    )


def made(
    args: argparse.Namespace, tokenizer: Any, model: torch.nn.Module, work: Path
) -> dict[str, Checkpoint]:
    """The dense model and a compressed one for each kept share, from one calibration."""
    checkpoints = {"dense": Checkpoint.open(args.model)}
    whole = recipe(args, 1.0)
    structure = structure_of(args.model)
    if not (work / "factors").exists():
        tokens, _ = encoder_texts(whole.calibration, whole.evaluate, tokenizer)
        reporter = Reporter(quiet=True)
        part = work / "factors.part"
        shutil.rmtree(part, ignore_errors=True)
        factorize_blocks(whole, structure, model, tokens, part, reporter)
        part.rename(work / "factors")
    for kept in args.kept.split(","):
        if (work / f"kept-{kept}").exists():
            checkpoints[f"kept {kept}"] = Checkpoint.open(work / f"kept-{kept}")
            continue
        plan = compress.allocate_ranks(recipe(args, float(kept)), structure, work / "factors")
        low_rank = compress.low_rank_of(plan, structure)
        source = checkpoints["dense"]
        parts = assembled(
            source, low_rank, compress.pair_tensors(whole.compress, plan, work / "factors")
        )
        config = compressed_config(source.config, low_rank)
        write_checkpoint(work / f"kept-{kept}", args.model, config, parts)
        checkpoints[f"kept {kept}"] = Checkpoint.open(work / f"kept-{kept}")
    return checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kept", default="0.8,0.6,0.4")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--calibration", type=Path, help="text (default: the fetched one)")
    parser.add_argument("--text", type=Path, help="held-out text (default: the fetched one)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--allocate", choices=("uniform", "greedy"), default="uniform")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="0: no timing")
    parser.add_argument("--work", type=Path, help="keep the models here, or take them from here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.calibration = args.calibration or args.model / "text-calibration.txt"
    args.text = args.text or args.model / "text-evaluation.txt"
    torch.set_num_threads(args.threads)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    lines = sentences(args.text.read_text(encoding="utf-8"), args.sentences)
    fed = batches(tokenizer, lines)
    with torch.no_grad():
        encoder = SentenceEncoder(model, pooling_of(args.model))
        meant = np.concatenate(
            [encoder(torch.from_numpy(t), torch.from_numpy(m))[1].numpy() for t, m in fed]
        )
    print(f"{len(lines)} sentences; {args.allocate} ranks; {args.threads} threads", flush=True)
    rows = []
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        decides = (args.model.resolve(), args.calibration.read_text(), args.samples, args.allocate)
        work /= hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
        work.mkdir(parents=True, exist_ok=True)
        checkpoints = made(args, tokenizer, model, work)
        for precision in args.precisions.split(","):
            rows += _precision(args, precision, checkpoints, work, fed, meant)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _precision(
    args: argparse.Namespace,
    precision: str,
    checkpoints: dict[str, Checkpoint],
    work: Path,
    fed: list[tuple[np.ndarray, np.ndarray]],
    meant: np.ndarray,
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    count = len(meant)
    near = np.stack([np.arange(0, count - 1, 2), np.arange(1, count, 2)[: count // 2]])
    pairs = np.concatenate([near, rng.integers(0, count, (2, 4 * count))], axis=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    rows: list[dict[str, Any]] = []
    dense: EncoderRuntime | None = None
    for name, checkpoint in checkpoints.items():
        out = work / f"{name.replace(' ', '-')}-{precision}"
        spec = OnnxExport.model_validate({"precision": precision})
        if not out.exists():
            export(ExportRequest(checkpoint, args.model, None, out, work, spec))
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        runtime = EncoderRuntime(out, threads=args.threads)
        found = np.concatenate([runtime.embed(t, m) for t, m in fed])
        cosine = (found * meant).sum(axis=1)
        similar = [(e[pairs[0]] * e[pairs[1]]).sum(axis=1) for e in (meant, found)]
        row: dict[str, Any] = {
            "model": name,
            "precision": precision,
            "bytes": size,
            "cosine": float(cosine.mean()),
            "cosine_5th_percentile": float(np.quantile(cosine, 0.05)),
            "rank_correlation": spearman(*similar),
        }
        if dense is not None and args.rounds:
            settings = SpeedSettings(args.threads, args.rounds, (32, 128, 256), 0)
            report = measure([dense, runtime], settings)
            for timing in report.artifacts[1].timings:
                assert timing.speedup is not None
                row[timing.metric] = [timing.tps, timing.speedup.median, timing.verdict]
        rows.append(row)
        speeds = "  ".join(
            f"{key} {value[1]:.2f}x {value[2]}"
            for key, value in row.items()
            if key.startswith("prefill")
        )
        print(
            f"{precision:5} {name:9} {size / 1e6:6.1f} MB  cosine {row['cosine']:.4f} "
            f"(5th percentile {row['cosine_5th_percentile']:.4f})  rank correlation "
            f"{row['rank_correlation']:.4f}  {speeds}",
            flush=True,
        )
        if dense is None:
            dense = runtime
        else:
            runtime.close()
    return rows


if __name__ == "__main__":
    sys.exit(main())
