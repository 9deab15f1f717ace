"""Run the shipped recipes one after the other and write into their heads what they gave.

    python tools/benchmarks/recipes.py [NAME...] --out out/recipes [--write] [--set key=value ...]

Each is `svdexport run recipes/NAME.yaml --out OUT/NAME --json`; a run that was stopped goes on, one
that was published is read again. Prints for each compressed file one line: bytes and perplexity of
dense twin and file (of an encoder: how near its embeddings are), speedups with their 95 %
intervals, and the verdict. ``--write`` puts the lines into the recipe's head in place of those
that begin with ``# Gave``. A speed whose samples were disturbed is not quoted. Takes 6 to 15
minutes a recipe on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from svdexport.report.result import ArtifactResult, RunResult, from_dict
from svdexport.verify.speed import too_disturbed

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = (
    "laptop-gguf",
    "mobile-onnx",
    "browser-onnx",
    "extreme-2bit",
    "stock-llamacpp",
    "encoder-onnx",
    "ci-release",
)
NOISY = 7  # exit code: the machine was too noisy to say
WRONG = (1, 2, 3, 6)  # exit codes of runs that have no figures


def run(name: str, out: Path, overrides: list[str]) -> RunResult:
    """The result of a recipe, whatever its verdict."""
    command = [sys.executable, "-m", "svdexport", "run", str(RECIPES / f"{name}.yaml")]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(
        [*command, "--out", str(out / name), "--json"],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode in WRONG or not done.stdout:  # or it was stopped
        raise SystemExit(f"{name}: exit {done.returncode}")
    data = json.loads(done.stdout)
    data.pop("out")
    return from_dict(data)


def gave(result: RunResult) -> list[str]:
    """One line for each compressed file."""
    machine = result.machine.get("cpu") or result.machine.get("processor") or "this machine"
    lines = []
    for artifact in result.artifacts:
        if artifact.role != "compressed":
            continue
        twin = result.baseline_of(artifact)
        before = "" if twin is None else f"{twin.bytes / 1e6:.1f} -> "
        parts = [f"{before}{artifact.bytes / 1e6:.1f} MB", _quality(artifact, twin)]
        speed = _speed(artifact, noisy=result.verdict.exit_code == NOISY)
        lines.append(f"Gave ({artifact.label}): " + ", ".join([*filter(None, parts), speed]) + ".")
    for found in result.equal_bytes:
        lines.append(
            f"Gave beside it plainly quantised ({found.plain_bytes / 1e6:.1f} MB): perplexity "
            f"{found.plain_perplexity:.1f}, which is {found.plain_is}."
        )
    return [*lines, f"Gave as verdict: {result.verdict.word}; {result.threads} threads, {machine}."]


def _quality(artifact: ArtifactResult, twin: ArtifactResult | None) -> str:
    near = artifact.embeddings
    if near is not None:
        return f"cosine {near.mean_cosine:.3f}, rank correlation {near.rank_correlation:.3f}"
    if artifact.quality is None:
        return ""
    dense = None if twin is None else twin.quality
    before = "" if dense is None else f"{dense.perplexity:.1f} -> "
    return f"perplexity {before}{artifact.quality.perplexity:.1f}"


def _speed(artifact: ArtifactResult, noisy: bool) -> str:
    speed = artifact.speed
    if speed is None:
        return "speed not measured"
    disturbed = (too_disturbed(t.disturbed_rounds, len(t.samples)) for t in speed.timings)
    if noisy or any(disturbed):
        return "speed not said (noisy machine)"
    found = {"prefill": speed.prefill_speedup, "decode": speed.decode_speedup}
    return ", ".join(
        f"{name} {s.median:.2f}x ({s.low:.2f} to {s.high:.2f})"
        for name, s in found.items()
        if s is not None
    )


def with_head(text: str, lines: list[str]) -> str:
    """The recipe's text with these lines at the end of its head; older ones are dropped."""
    head, rest = [], text.splitlines()
    while rest and rest[0].startswith("#"):
        head.append(rest.pop(0))
    kept: list[str] = []
    dropping = False
    for line in head:
        dropping = line.startswith("# Gave") or (dropping and line.startswith("#   "))
        if not dropping:
            kept.append(line)
    for line in lines:
        kept += textwrap.wrap(line, 98, initial_indent="# ", subsequent_indent="#   ")
    return "\n".join([*kept, *rest]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("out/recipes"))
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for name in options.names or NAMES:
        lines = gave(run(name, options.out, options.set))
        print(f"{name}:", *lines, sep="\n  ", flush=True)
        if options.write:
            path = RECIPES / f"{name}.yaml"
            path.write_text(with_head(path.read_text(), lines))


if __name__ == "__main__":
    main()
