"""From a recipe file to a job: its inputs checked, its folders open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdexport.pipeline.distributed import joined, serve
from svdexport.pipeline.inputs import inputs_key
from svdexport.pipeline.preflight import check_inputs
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Recipe, load_recipe, recipe_hash
from svdexport.rundir import RunDir, resource_errors

if TYPE_CHECKING:
    from svdexport.pipeline.job import Job


@contextlib.contextmanager
def started(
    recipe_path: Path,
    out: Path | str | None,
    overrides: Sequence[str],
    restart: bool,
    reporter: Reporter | None,
    timed: bool = True,
) -> Iterator[Job]:
    """The job of a recipe, its output locked; other processes of ``torchrun`` serve and end here.

    Inputs are checked before torch is imported; ``timed``: the exports' speed is to be measured.
    Raises RecipeError, InputError and ResourceError.
    """
    place = Path(out) if out else Path("out") / recipe_path.stem
    with joined() as ranks:
        if ranks is not None and ranks.rank:
            serve(ranks, recipe_path, overrides, place)
            raise SystemExit(0)
        recipe = load_recipe(recipe_path, overrides)
        rundir = RunDir(
            place,
            recipe_hash=recipe_hash(recipe),
            inputs=inputs_key(recipe),
            protected=protected(recipe),
            restart=restart,
        )
        check_inputs(recipe, timed=timed)
        from svdexport.core.ranks import ALONE
        from svdexport.pipeline.job import Job, default_threads

        threads = recipe.speed.threads or default_threads()
        with resource_errors(str(rundir.work)), rundir:
            yield Job(recipe, rundir, reporter or Reporter(quiet=True), threads, ranks or ALONE)


def protected(recipe: Recipe) -> list[Path]:
    """What a run reads and must not overwrite."""
    paths = [recipe.model.path, recipe.model.gguf, recipe.calibration.file, recipe.evaluate.text]
    return [path for path in paths if path is not None]
