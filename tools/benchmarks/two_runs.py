"""Do two timings of the same files agree? Run it on cores that do nothing else.

    python tools/benchmarks/two_runs.py NEW --baseline OLD

Times NEW against OLD twice by svdexport's protocol and prints, for each metric, both median
ratios and their difference. Exit 0 where all agree within 5 %, 5 where one does not, 7 where a run
was too disturbed to say, or says itself by a wide interval that its ratio is not to be trusted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from svdexport import api
from svdexport.pipeline.reporter import Reporter
from svdexport.verify.speed import WIDE, too_disturbed

LIMIT = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    runs = []
    for _ in range(2):
        found = api.bench(
            [given.new], baseline=given.baseline, rounds=given.rounds, reporter=Reporter()
        )
        runs.append({timing["metric"]: timing for timing in found["artifacts"][1]["timings"]})
    apart = noisy = 0
    for metric, first in runs[0].items():
        second = runs[1][metric]
        one, two = first["speedup"]["median"], second["speedup"]["median"]
        gap = abs(one / two - 1)
        print(f"{metric}: {_words(first)}; {_words(second)}; {gap:.1%} apart")
        if _noisy(first) or _noisy(second):
            noisy += 1
        else:
            apart += gap > LIMIT
    if noisy:
        print(f"{noisy} metrics were too noisy to say")
    return 5 if apart else 7 if noisy else 0


def _words(timing: dict[str, Any]) -> str:
    found = timing["speedup"]
    return (
        f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f}; "
        f"{timing['disturbed_rounds']} of {len(timing['samples'])} rounds disturbed)"
    )


def _noisy(timing: dict[str, Any]) -> bool:
    found = timing["speedup"]
    wide = found["high"] - found["low"] > WIDE * found["median"]
    return wide or too_disturbed(timing["disturbed_rounds"], len(timing["samples"]))


if __name__ == "__main__":
    sys.exit(main())
