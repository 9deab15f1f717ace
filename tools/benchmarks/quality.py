"""Perplexity of a compressed model before and after refinement, on text that neither has seen.

The text is split by lines: calibration and training take the first 60 %, the perplexity the first
windows of the rest. Unless ``--samples`` says otherwise the method calibrates on 32 x 512 tokens
and a refiner that trains may read all of the first part.

    python tools/benchmarks/quality.py --text FILE --kept 0.8 --refine distill --minutes 45

``--refine`` may be repeated (they run in order) or left out; ``--set`` changes any key of the
recipe, for example ``--set refine.0.learning_rate=1e-3``. An interrupted run goes on where it
stopped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svdexport import api
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import load_recipe

SHARE = 0.6
ALL = 10**6  # windows: as many as the text has
TRAINED = ("distill", "lora")  # refiners that take minutes and steps


@dataclass(frozen=True)
class Figures:
    """Perplexities on the held-out text, and the seconds of the stages."""

    dense: float
    compressed: float
    refined: float | None
    seconds: dict[str, float]
    notes: tuple[str, ...]


def split_text(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first 60 % of the lines and the rest to files of their own."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * SHARE)
    paths = (folder / "calibration.txt", folder / "evaluation.txt")
    for path, part in zip(paths, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def recipe(args: argparse.Namespace, calibration: Path, evaluation: Path) -> dict[str, Any]:
    refine = []
    for name in args.refine:
        entry: dict[str, Any] = {"method": name}
        if name in TRAINED:
            entry |= {"samples": ALL, "length": args.length}
            entry |= {} if args.minutes is None else {"minutes": args.minutes}
            entry |= {} if args.steps is None else {"steps": args.steps}
        refine.append(entry)
    return {
        "schema": 1,
        "model": {"path": str(args.model.absolute())},
        "calibration": {
            "source": "file",
            "file": str(calibration.absolute()),
            "samples": args.samples,
            "length": args.length,
        },
        "compress": {
            "method": args.method,
            "group": not args.apart,
            "budget": {"param_ratio": args.kept},
            "rank_multiple": args.rank_multiple,
        },
        "refine": refine,
        "export": [{"format": "checkpoint"}],
        "evaluate": {"text": str(evaluation.absolute())},
        "speed": {"threads": args.threads},
    }


def measure(args: argparse.Namespace) -> Figures:
    args.work.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = split_text(args.text, args.work)
    text = yaml.safe_dump(recipe(args, calibration, evaluation), sort_keys=False)
    mark = hashlib.sha256((text + "\n".join(args.set)).encode()).hexdigest()[:10]
    file = args.work / f"{args.method}-{args.kept:g}-{mark}.yaml"
    file.write_text(text)
    load_recipe(file, args.set)

    def perplexity(folder: Path) -> float:
        found = api.evaluate(
            folder, evaluation, context=1024, windows=args.windows, threads=args.threads
        )
        return float(found["perplexity"])

    reporter = Reporter()
    began = time.perf_counter()
    last = api.compress(file, args.work / file.stem, args.set, reporter=reporter)
    seconds = {name: round(spent, 1) for name, spent, _ in reporter.stages}
    seconds["all"] = round(time.perf_counter() - began, 1)
    first = last.parent / "checkpoint"
    refined = perplexity(last) if last != first else None
    records = sorted((last.parent / "refine").glob("*.json")) if refined is not None else []
    notes = tuple(note for record in records for note in json.loads(record.read_text()))
    return Figures(perplexity(args.model), perplexity(first), refined, seconds, notes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--method", default="kfac_svd")
    parser.add_argument("--kept", type=float, default=0.8)
    parser.add_argument("--apart", action="store_true", help="an A for each linear, none shared")
    parser.add_argument("--rank-multiple", type=int, default=16)
    parser.add_argument("--refine", action="append", default=[])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    args = parser.parse_args()
    found = measure(args)
    for note in found.notes:
        print(note, file=sys.stderr)
    refine = " + ".join(args.refine)
    print(
        f"{args.method}, kept {args.kept:g}{f', {refine}' if refine else ''}: perplexity "
        f"{found.dense:.2f} dense, {found.compressed:.2f} compressed"
        + (f", {found.refined:.2f} refined" if found.refined is not None else "")
    )
    print(
        json.dumps(
            {
                "method": args.method,
                "kept": args.kept,
                "grouped": not args.apart,
                "refine": args.refine,
                "minutes": args.minutes,
                "steps": args.steps,
                "perplexity_dense": found.dense,
                "perplexity_compressed": found.compressed,
                "perplexity_refined": found.refined,
                "seconds": found.seconds,
                "notes": list(found.notes),
            }
        )
    )


if __name__ == "__main__":
    main()
