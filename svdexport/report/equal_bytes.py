"""At equal bytes: each compressed file against the plainly quantised one of like size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from svdexport.core.measures import Quality, Speedup
from svdexport.report.result import ArtifactResult, Comparison

# A mean difference counts from two standard errors of the differences between windows.
_ERRORS = 2.0


def comparisons(artifacts: Sequence[ArtifactResult]) -> tuple[Comparison, ...]:
    """One for each compressed artifact that has a plain rival of its format (nearest in size)."""
    found = []
    for artifact in artifacts:
        rivals = [a for a in artifacts if a.role == "plain" and a.format == artifact.format]
        if artifact.role != "compressed" or not rivals:
            continue
        rival = min(rivals, key=lambda a: (a.bytes > artifact.bytes, abs(a.bytes - artifact.bytes)))
        if artifact.quality is not None and rival.quality is not None:
            found.append(_compare(artifact, artifact.quality, rival, rival.quality))
    return tuple(found)


def _compare(
    artifact: ArtifactResult, mine: Quality, rival: ArtifactResult, its: Quality
) -> Comparison:
    gap = np.asarray(its.window_nll) - np.asarray(mine.window_nll)  # above 0: plain is worse
    error = float(gap.std(ddof=1) / np.sqrt(gap.size)) if gap.size > 1 else np.inf
    mean = float(gap.mean())
    word = "undecided" if abs(mean) <= _ERRORS * error else "worse" if mean > 0 else "better"
    # A plain file beside several compressed ones was timed with one of them.
    same_twin = artifact.speed and rival.speed and artifact.speed.baseline == rival.speed.baseline
    return Comparison(
        artifact=artifact.path,
        plain=rival.path,
        plain_is=word,  # type: ignore[arg-type]
        bytes=artifact.bytes,
        plain_bytes=rival.bytes,
        perplexity=mine.perplexity,
        plain_perplexity=its.perplexity,
        decode_speedup=_median(artifact, "decode_speedup"),
        plain_decode_speedup=_median(rival, "decode_speedup") if same_twin else None,
    )


def _median(artifact: ArtifactResult, name: str) -> float | None:
    found: Speedup | None = None if artifact.speed is None else getattr(artifact.speed, name)
    return None if found is None else found.median
