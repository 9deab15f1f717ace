"""A run by several processes that ``torchrun`` started, on one machine or several.

Rank 0 does what a run by one process does. In the stage "factors" the others take their share of
the calibration samples and of the factorisations; after it they end.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from svdexport.errors import ResourceError

if TYPE_CHECKING:
    from svdexport.core.ranks import Ranks

# A peer that dies closes its connection at once; this is for one that waits for rank 0's text.
PATIENCE = timedelta(days=7)


@contextlib.contextmanager
def joined() -> Iterator[Ranks | None]:
    """The processes that torchrun started (it sets RANK and WORLD_SIZE); None for one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield None
        return
    import torch.distributed as dist

    from svdexport.core.ranks import Ranks

    signal.signal(signal.SIGTERM, _stopped)
    dist.init_process_group("gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        yield ranks
    finally:
        ranks.dismiss()
        dist.destroy_process_group()


def _stopped(_signal: int, _frame: FrameType | None) -> None:
    raise ResourceError(
        "stopped by the launcher, as another process of this run has ended; run the same command "
        "again: it goes on from the last finished block"
    )


def serve(ranks: Ranks, recipe_path: Path, overrides: Sequence[str], out: Path) -> None:
    """What a rank other than 0 does: its share of the factors, when rank 0 asks for it."""
    from svdexport.core.ranks import STOP

    while (order := ranks.await_order())["do"] != STOP:
        from svdexport.pipeline.job import Job, ModelUnderWork, default_threads
        from svdexport.pipeline.reporter import Reporter
        from svdexport.pipeline.stages import share_factors
        from svdexport.recipe import load_recipe, recipe_hash
        from svdexport.rundir import RunDir

        recipe = load_recipe(recipe_path, overrides)
        rundir = RunDir(out, recipe_hash=recipe_hash(recipe))  # not entered: rank 0 writes
        threads = recipe.speed.threads or default_threads()
        job = Job(recipe, rundir, Reporter(quiet=True), threads, ranks)
        share_factors(job, ModelUnderWork(job), order)
