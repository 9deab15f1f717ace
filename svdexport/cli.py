"""The command line. stdout carries results (one JSON object with --json); progress is on stderr."""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from svdexport import __version__, cli_info, cli_measure
from svdexport.cli_options import (
    JsonOpt,
    OfflineOpt,
    OutOpt,
    QuietOpt,
    RecipeArg,
    SetOpt,
    command,
    out_console,
    print_json,
    reporter_of,
    show,
    show_failure,
)
from svdexport.errors import EXIT_BUG, RecipeError, SvdexportError
from svdexport.safety.network import no_network

RESUMABLE = ("run", "compress", "export", "frontier")  # commands that keep finished stages
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C

app = typer.Typer(
    help="Compress language models into low-rank pairs and export them, measured. "
    "Example: svdexport run recipes/quickstart.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@command(app)
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
    typed = shlex.join(["svdexport", *sys.argv[1:]])
    outcome = api.run(
        recipe, out, set_ or [], restart=restart, reporter=reporter_of(quiet), command=typed
    )
    if as_json:
        place = str(outcome.out) if outcome.out else None
        print_json({"out": place} | to_dict(outcome.result))
    else:
        show(summary(outcome.result), quiet)
        if outcome.out:
            show(f"written: {outcome.out} (open report.html there)", quiet)
        else:
            show("nothing was written under the output's name", quiet)
    verdict = outcome.result.verdict
    if verdict.exit_code:
        show_failure(verdict.word, verdict.reasons, quiet)
    raise typer.Exit(verdict.exit_code)


@command(app)
def frontier(
    recipe: RecipeArg,
    budget: Annotated[
        list[str],
        typer.Option("--budget", help="Bytes of a file, as 80000000 or 80MB; repeatable."),
    ],
    plain: Annotated[
        list[str] | None, typer.Option("--plain", help="llama.cpp's mixes to show beside ours.")
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Measure quality alone.")] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Output folder; default: out/, the recipe's name, -frontier."),
    ] = None,
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
    if min(sizes, default=1) <= 0:
        raise RecipeError("--budget: a file has more than 0 bytes; write, for example, 60MB")
    folder = api.frontier(
        recipe,
        sizes,
        out,
        set_ or [],
        plain=plain or [],
        speed=not no_speed,
        reporter=reporter_of(quiet),
    )
    show((folder / "frontier.md").read_text(encoding="utf-8"), quiet)
    show(f"written: {folder}", quiet)


@command(app)
def plan(recipe: RecipeArg, set_: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Show what a recipe would do, from the model's headers alone: ranks, parameters, memory.

    Example: svdexport plan recipes/quickstart.yaml --set compress.budget.param_ratio=0.5
    """
    from svdexport import api
    from svdexport.report.terminal import plan_table

    found = api.plan(recipe, set_ or [])
    if as_json:
        print_json(found)
    else:
        show(plan_table(found))


@command(app)
def init(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a GGUF file.")],
    target: Annotated[
        str,
        typer.Option(
            "--for",
            help="laptop, phone, browser or server.",
            autocompletion=lambda: ["laptop", "phone", "browser", "server"],
        ),
    ] = "laptop",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="The recipe; default: the model's name and the target."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a commented recipe that fits a model and a target. Reads headers only.

    Example: svdexport init ./SmolLM2-135M-Instruct --for phone
    """
    from svdexport import api

    written = api.init(model, target, out)  # type: ignore[arg-type]
    if as_json:
        print_json({"recipe": str(written)})
    else:
        show(f"{written}: look at it, then `svdexport plan {written}`")


@command(app)
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
    checkpoint = api.compress(recipe, out, set_ or [], reporter=reporter_of(quiet))
    if as_json:
        print_json({"checkpoint": str(checkpoint)})
    else:
        show(str(checkpoint), quiet)


@command(app)
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
    paths = [str(p) for p in api.export(recipe, out, set_ or [], reporter=reporter_of(quiet))]
    if as_json:
        print_json({"artifacts": paths})
    else:
        show("\n".join(paths), quiet)


@command(app)
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `svdexport run` published.")],
    quality: Annotated[
        bool, typer.Option("--quality", help="Measure perplexity and divergence again.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time against the dense twin again, here.")
    ] = False,
    hashes_only: Annotated[
        bool, typer.Option("--hashes-only", help="Files and tensors alone; nothing is run.")
    ] = False,
    model: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--model", help="The source model, for --quality and --speed."),
    ] = None,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--threads", min=1, help="Threads; default: as many as the run used."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let Python code in the folder and in the source model run.",
        ),
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Check a published folder: hashes of files and tensors, then parity in each runtime.

    Exit 3 names the file and the tensor that changed; 4, 5 and 7 are those of `run`.

    Example: svdexport verify out/quickstart --speed --model models/SmolLM2-135M-Instruct
    """
    from svdexport import api
    from svdexport.report.terminal import verify_table

    found = api.verify(
        folder,
        parity=not hashes_only,
        quality=quality,
        speed=speed,
        model=model,
        threads=threads,
        trust_remote_code=trust_remote_code,
        reporter=reporter_of(quiet),
    )
    shown: dict[str, Any] = {"folder": str(folder), "ok": True}
    if found is not None:
        shown |= dataclasses.asdict(found) | {"ok": found.verdict.word == "pass"}
    if as_json:
        print_json(shown)
    else:
        show(verify_table(shown), quiet)
    if found is None or not found.verdict.exit_code:
        return
    show_failure(found.verdict.word, found.verdict.reasons, quiet)
    raise typer.Exit(found.verdict.exit_code)


@command(app)
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
        print_json({"folder": str(folder), "verdict": result.verdict.word})
    else:
        show(f"{folder}: README.md, report.html and summary.md written")


cli_measure.register(app)
cli_info.register(app)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out_console.print(f"svdexport {__version__}")
        raise typer.Exit


def _how_to_go_on() -> str:
    """What an ended command's line ends with: the stages that it had done are kept."""
    if len(sys.argv) < 2 or sys.argv[1] not in RESUMABLE:
        return ""
    without = " without --restart" if "--restart" in sys.argv else ""
    return f"; the same command{without} resumes"


def main() -> None:
    """Entry point: SvdexportError becomes one line on stderr and its exit code."""
    # the compressed model never needs the network; a library must not try it behind our back
    no_network(force=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character it lacks must not end the command
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except SvdexportError as error:
        print(f"svdexport: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns an interrupt into an exit with EXIT_INTERRUPTED, and says nothing
        if isinstance(end, SystemExit) and end.code != EXIT_INTERRUPTED:
            if not end.code and int(os.environ.get("RANK", "0")) > 0:
                # nothing is left to do; a thread of gloo's may still end, and abort the process
                sys.stderr.flush()
                os._exit(0)
            raise
        print(f"svdexport: stopped{_how_to_go_on()}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except MemoryError:
        print(f"svdexport: out of memory{_how_to_go_on()}", file=sys.stderr)
        sys.exit(6)
    except Exception:
        logging.getLogger(__name__).exception("a bug in svdexport; please report it")
        sys.exit(EXIT_BUG)
    finally:
        gc.freeze()  # a last search for cycles in all of torch would take a second


if __name__ == "__main__":
    main()
