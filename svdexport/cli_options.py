"""Options that several commands share, and how commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer
from rich.console import Console, RenderableType

Function = TypeVar("Function", bound=Callable[..., Any])

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
QuietOpt = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing but errors; with --json the object too.")
]
OfflineOpt = Annotated[
    bool, typer.Option("--offline", help="Refuse every network connection, data sets' too.")
]
ThreadsOpt = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", min=1, help="Threads; default: the cores this process may use."),
]
RuntimeOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--runtime",
        help="llama.cpp, onnxruntime, onnxruntime-genai or torch.",
        autocompletion=lambda: ["llama.cpp", "onnxruntime", "onnxruntime-genai", "torch"],
    ),
]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Function], Function]:
    """A command whose first line stands whole, not cut, in the list of commands."""

    def add(function: Function) -> Function:
        first = (function.__doc__ or "").partition("\n")[0]
        return app.command(name, short_help=first)(function)

    return add


def show(what: RenderableType, quiet: bool = False) -> None:
    """A result on stdout, for a person; a plain line is not broken. Nothing with --quiet."""
    if not quiet:
        out_console.print(what, soft_wrap=isinstance(what, str), markup=False)


def show_failure(word: str, reasons: Sequence[str], quiet: bool) -> None:
    """With --quiet, what did not pass stands on stderr in a line, as an error does."""
    if quiet:
        print(f"svdexport: {word}: {'; '.join(reasons)}", file=sys.stderr)


def reporter_of(quiet: bool) -> Any:
    """Progress on stderr, or none."""
    from svdexport.pipeline.reporter import Reporter

    return Reporter(quiet)


def print_json(data: Any) -> None:
    """One JSON object on stdout, in ASCII, which every encoding of it has."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
