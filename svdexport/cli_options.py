"""Options that several commands share, and how commands print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

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


def reporter_of(quiet: bool) -> Any:
    """Progress on stderr, or none."""
    from svdexport.pipeline.reporter import Reporter

    return Reporter(quiet)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n")
