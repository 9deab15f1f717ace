"""Commands that measure or show artifacts and methods: eval, bench, compare, inspect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from svdexport.cli_options import (
    JsonOpt,
    QuietOpt,
    RecipeArg,
    RuntimeOpt,
    SetOpt,
    ThreadsOpt,
    command,
    print_json,
    reporter_of,
    show,
    show_failure,
)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    command(app, "eval")(eval_)
    for function in (bench, compare, inspect):
        command(app)(function)


def eval_(
    artifact: Annotated[Path, typer.Argument(help="GGUF file, ONNX folder or checkpoint folder.")],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text file.")],
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--reference", help="Artifact to measure the divergence from."),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 1024,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--windows", min=1, help="Windows from the start of the text; default: all."),
    ] = None,
    runtime: RuntimeOpt = None,
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Perplexity of any artifact on a text, and KL divergence from a reference artifact.

    Example: svdexport eval model.gguf --text wiki.txt --reference ./SmolLM2-135M-Instruct
    """
    from svdexport import api
    from svdexport.report.terminal import eval_table

    found = api.evaluate(
        artifact,
        text,
        reference=reference,
        context=context,
        windows=windows,
        runtime=runtime,
        threads=threads,
        reporter=reporter_of(quiet),
    )
    if as_json:
        print_json(found)
    else:
        show(eval_table(found), quiet)


def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts; the first is the baseline.")],
    baseline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--baseline", help="Artifact that the others are compared with."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 9,
    prefill: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--prefill", min=1, help="Prompt length in tokens; may be repeated."),
    ] = None,
    decode: Annotated[
        int, typer.Option("--decode", min=1, help="Single-token steps; none of an encoder.")
    ] = 64,
    runtime: RuntimeOpt = None,
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Time artifacts side by side in turn: prefill and decode tokens/s, ratio with interval.

    Of an encoder, which writes no text, prefill alone.
    Exit 5 where one is slower than the baseline, 7 where the machine was too noisy to say.

    Example: svdexport bench compressed.gguf --baseline dense.gguf
    """
    from svdexport import api
    from svdexport.errors import EXIT_NOISY, EXIT_OK, EXIT_SPEED
    from svdexport.report.terminal import bench_table

    found = api.bench(
        artifacts,
        baseline=baseline,
        rounds=rounds,
        prefill=prefill or (128, 512),
        decode=decode,
        runtime=runtime,
        threads=threads,
        reporter=reporter_of(quiet),
    )
    if as_json:
        print_json(found)
    else:
        show(bench_table(found), quiet)
    if found["verdict"] != "ok":
        show_failure(found["verdict"], found["notes"] or _decisive(found), quiet)
    codes = {"ok": EXIT_OK, "slower": EXIT_SPEED, "inconclusive": EXIT_NOISY}
    raise typer.Exit(codes[found["verdict"]])


def _decisive(found: dict[str, Any]) -> list[str]:
    """The timings that gave a bench its verdict, with their intervals."""
    return [
        f"{artifact['path']}: {timing['metric']} {timing['speedup']['median']:.2f} "
        f"({timing['speedup']['low']:.2f} to {timing['speedup']['high']:.2f})"
        for artifact in found["artifacts"]
        for timing in artifact["timings"]
        if timing["speedup"] is not None and timing["verdict"] == found["verdict"]
    ]


def compare(
    recipe: RecipeArg,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Output folder; default: out/compare- and the recipe's name."),
    ] = None,
    set_: SetOpt = None,
    ratio: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option("--ratio", help="Kept ratio; may be repeated. Default: 0.8 0.6 0.4."),
    ] = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--method", help="Method to compare; may be repeated. Default: all."),
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """All methods side by side on the recipe's model and texts: perplexity at each kept ratio.

    Example: svdexport compare recipes/compare.yaml --method svd_llm --method kfac_svd
    """
    from svdexport import api
    from svdexport.report.comparison import table

    found = api.compare(
        recipe,
        out,
        set_ or [],
        ratios=ratio or (0.8, 0.6, 0.4),
        labels=method or (),
        reporter=reporter_of(quiet),
    )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show(table(found), quiet)


def inspect(
    artifact: Annotated[Path, typer.Argument(help="GGUF file, ONNX folder or checkpoint folder.")],
    as_json: JsonOpt = False,
) -> None:
    """What an artifact holds, layer by layer, and which runtime it needs. Reads headers only.

    Example: svdexport inspect out/quickstart/model-Q8_0.gguf
    """
    from svdexport import api
    from svdexport.report.terminal import inspect_table

    found = api.inspect(artifact)
    if as_json:
        print_json(found)
    else:
        show(inspect_table(found))
