"""The command line. stdout carries results (one JSON object with --json); progress is on stderr."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from svdexport import __version__
from svdexport.errors import EXIT_BUG, RecipeError, SvdexportError
from svdexport.safety.network import no_network

app = typer.Typer(
    help="Compress language models into low-rank pairs and export them, measured. "
    "Example: svdexport run recipes/quickstart.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out_console = Console(highlight=False)

RecipeArg = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
OutOpt = Annotated[
    Optional[Path],  # noqa: UP045 (typer on Python 3.10)
    typer.Option("--out", help="Output folder; default: out/ and the recipe's name."),
]
SetOpt = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="Override a recipe's key: key=value. May be repeated."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
OfflineOpt = Annotated[
    bool, typer.Option("--offline", help="Refuse every network connection, data sets' too.")
]
ThreadsOpt = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", min=1, help="Threads; default: the cores this process may use."),
]
RuntimeOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--runtime", help="llama.cpp, onnxruntime, onnxruntime-genai or torch."),
]


def _reporter(quiet: bool) -> Any:
    from svdexport.pipeline.reporter import Reporter

    return Reporter(quiet)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n")


@app.command()
def run(
    recipe: RecipeArg,
    out: OutOpt = None,
    set_: SetOpt = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an unfinished run left behind.")
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    offline: OfflineOpt = False,
) -> None:
    """Run a recipe from model to verdict; a second call resumes where the first stopped.

    Example: svdexport run recipes/quickstart.yaml --set compress.budget.param_ratio=0.7
    """
    from svdexport import api
    from svdexport.report.result import to_dict
    from svdexport.report.table import summary

    if offline:
        no_network(force=True)
    command = shlex.join(["svdexport", *sys.argv[1:]])
    outcome = api.run(
        recipe, out, set_ or [], restart=restart, reporter=_reporter(quiet), command=command
    )
    if as_json:
        place = str(outcome.out) if outcome.out else None
        _print_json({"out": place} | to_dict(outcome.result))
    else:
        out_console.print(summary(outcome.result))
        if outcome.out:
            out_console.print(f"written: {outcome.out} (open report.html there)")
        else:
            out_console.print("nothing was written under the output's name")
    raise typer.Exit(outcome.result.verdict.exit_code)


@app.command()
def frontier(
    recipe: RecipeArg,
    budget: Annotated[list[str], typer.Option("--budget", help="Bytes of a file; repeatable.")],
    plain: Annotated[
        list[str] | None, typer.Option("--plain", help="llama.cpp's mixes to show beside ours.")
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Measure quality alone.")] = False,
    out: OutOpt = None,
    set_: SetOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Write GGUF files of several sizes and measure them beside llama.cpp's plain types.

    Example: svdexport frontier recipes/smallest-gguf.yaml --budget 92MB --budget 80MB
    """
    from svdexport import api
    from svdexport.recipe import parse_bytes

    try:
        sizes = [int(parse_bytes(value)) for value in budget]
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None
    mixes = plain or ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
    folder = api.frontier(
        recipe, sizes, out, set_ or [], plain=mixes, speed=not no_speed, reporter=_reporter(quiet)
    )
    out_console.print((folder / "frontier.md").read_text(encoding="utf-8"))
    out_console.print(f"written: {folder}", soft_wrap=True)


@app.command()
def plan(recipe: RecipeArg, set_: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Show what a recipe would do, from the model's headers alone: ranks, parameters, memory.

    Example: svdexport plan recipes/quickstart.yaml --set compress.budget.param_ratio=0.5
    """
    from svdexport import api
    from svdexport.report.terminal import plan_table

    found = api.plan(recipe, set_ or [])
    if as_json:
        _print_json(found)
    else:
        out_console.print(plan_table(found))


@app.command()
def compress(
    recipe: RecipeArg,
    out: OutOpt = None,
    set_: SetOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    offline: OfflineOpt = False,
) -> None:
    """Do the stages up to the compressed checkpoint and print its folder; `run` goes on from it.

    Example: svdexport compress recipes/quickstart.yaml
    """
    from svdexport import api

    if offline:
        no_network(force=True)
    checkpoint = api.compress(recipe, out, set_ or [], reporter=_reporter(quiet))
    if as_json:
        _print_json({"checkpoint": str(checkpoint)})
    else:
        out_console.print(str(checkpoint), soft_wrap=True)


@app.command()
def export(
    recipe: RecipeArg,
    out: OutOpt = None,
    set_: SetOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    offline: OfflineOpt = False,
) -> None:
    """Do the stages up to the exported, checked files and print them; `run` goes on from them.

    Example: svdexport export recipes/laptop-gguf.yaml
    """
    from svdexport import api

    if offline:
        no_network(force=True)
    paths = [str(p) for p in api.export(recipe, out, set_ or [], reporter=_reporter(quiet))]
    if as_json:
        _print_json({"artifacts": paths})
    else:
        out_console.print("\n".join(paths), soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `svdexport run` published.")],
    as_json: JsonOpt = False,
) -> None:
    """Rehash a published folder's files and tensors with independent readers; exit 3 on a change.

    Example: svdexport verify out/quickstart
    """
    from svdexport import api

    result = api.verify(folder)
    count = sum(len(a.files) for a in result.artifacts if a.kept)
    if as_json:
        _print_json({"folder": str(folder), "files": count, "ok": True})
    else:
        out_console.print(f"{folder}: {count} files are what the manifest says")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `svdexport run` published.")],
    as_json: JsonOpt = False,
) -> None:
    """Render a published folder's model card, report.html and summary.md anew from its manifest.

    Example: svdexport report out/quickstart
    """
    from svdexport import api

    result = api.report(folder)
    if as_json:
        _print_json({"folder": str(folder), "verdict": result.verdict.word})
    else:
        out_console.print(f"{folder}: README.md, report.html and summary.md written")


@app.command("eval")
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
        reporter=_reporter(quiet),
    )
    if as_json:
        _print_json(found)
    else:
        out_console.print(eval_table(found))


@app.command()
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
    decode: Annotated[int, typer.Option("--decode", min=1, help="Single-token steps.")] = 64,
    runtime: RuntimeOpt = None,
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Time artifacts side by side in turn: prefill and decode tokens/s, ratio with interval.

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
        reporter=_reporter(quiet),
    )
    if as_json:
        _print_json(found)
    else:
        out_console.print(bench_table(found))
    codes = {"ok": EXIT_OK, "slower": EXIT_SPEED, "inconclusive": EXIT_NOISY}
    raise typer.Exit(codes[found["verdict"]])


@app.command()
def compare(
    recipe: RecipeArg,
    out: OutOpt = None,
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
    import dataclasses

    from svdexport import api
    from svdexport.report.comparison import table

    found = api.compare(
        recipe,
        out,
        set_ or [],
        ratios=ratio or (0.8, 0.6, 0.4),
        labels=method or (),
        reporter=_reporter(quiet),
    )
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        out_console.print(table(found), soft_wrap=True)


@app.command()
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
        _print_json(found)
    else:
        out_console.print(inspect_table(found))


@app.command()
def methods(as_json: JsonOpt = False) -> None:
    """The factorisation methods and the refiners, what each needs, and where it comes from.

    Example: svdexport methods --json
    """
    from svdexport.factorize import METHODS
    from svdexport.refine import REFINERS
    from svdexport.report.terminal import methods_table

    rows = [
        {"name": m.name, "title": m.title, "needs": ", ".join(sorted(m.needs)), "source": m.source}
        for m in METHODS.values()
    ]
    refiners = [
        {"name": f"refine: {r.name}", "title": r.title, "needs": "pairs", "source": r.source}
        for r in REFINERS.values()
    ]
    if as_json:
        _print_json({"methods": rows, "refiners": refiners})
    else:
        out_console.print(methods_table([*rows, *refiners]))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """Which runtimes and parts are installed, whether llama.cpp knows pairs, and how to get more.

    Example: svdexport doctor
    """
    from svdexport.pipeline.doctor import examine
    from svdexport.report.terminal import doctor_table

    found = examine()
    if as_json:
        _print_json(found)
    else:
        out_console.print(doctor_table(found))


@app.command()
def schema() -> None:
    """The JSON schema of recipes, for editors.

    Example: svdexport schema > recipe.schema.json
    """
    from svdexport.recipe import json_schema

    _print_json(json_schema())


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out_console.print(f"svdexport {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: SvdexportError becomes one line on stderr and its exit code."""
    # the compressed model never needs the network; a library must not try it behind our back
    no_network(force=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except SvdexportError as error:
        print(f"svdexport: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("svdexport: stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        print("svdexport: out of memory; the same command resumes", file=sys.stderr)
        sys.exit(6)
    except Exception:
        logging.getLogger(__name__).exception("a bug in svdexport; please report it")
        sys.exit(EXIT_BUG)


if __name__ == "__main__":
    main()
