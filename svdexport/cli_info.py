"""Commands that tell about this installation: methods, runtimes, the recipe's schema."""

from __future__ import annotations

from typing import Annotated

import typer

from svdexport.cli_options import JsonOpt, command, out_console, print_json


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for function in (methods, doctor, schema):
        command(app)(function)


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
        print_json({"methods": rows, "refiners": refiners})
    else:
        out_console.print(methods_table([*rows, *refiners]))


def doctor(as_json: JsonOpt = False) -> None:
    """Which runtimes and parts are installed, whether llama.cpp knows pairs, and how to get more.

    Example: svdexport doctor
    """
    from svdexport.pipeline.doctor import examine
    from svdexport.report.terminal import doctor_table

    found = examine()
    if as_json:
        print_json(found)
    else:
        out_console.print(doctor_table(found))


def schema(
    manifest: Annotated[
        bool, typer.Option("--manifest", help="Of manifest.json instead of recipes.")
    ] = False,
) -> None:
    """The JSON schema of recipes, for editors; or of the manifests that runs write.

    Example: svdexport schema > recipe.schema.json
    """
    if manifest:
        from svdexport.report.manifest import shipped_schema

        print_json(shipped_schema())
        return
    from svdexport.recipe import json_schema

    print_json(json_schema())
