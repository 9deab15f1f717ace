"""Do two timings of the same files agree? Run it on cores that do nothing else.

    python tools/benchmarks/two_runs.py NEW --baseline OLD

Times NEW against OLD twice by svdexport's protocol and prints, for each metric, both median
ratios and their difference. Exit 0 where all agree within 5 %, 5 where one does not, 7 where a run
was too disturbed to say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svdexport import api
from svdexport.pipeline.reporter import Reporter

LIMIT = 0.05
TOO_NOISY = 1 / 3  # share of disturbed rounds, as in a run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
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
        disturbed = [f"{t['disturbed_rounds']} of {len(t['samples'])}" for t in (first, second)]
        print(f"{metric}: {one:.3f} {two:.3f}, {gap:.1%} apart; disturbed rounds: {disturbed}")
        noisy += any(t["disturbed_rounds"] > TOO_NOISY * len(t["samples"]) for t in (first, second))
        apart += gap > LIMIT
    if noisy:
        print(f"{noisy} metrics were too disturbed to say")
        return 7
    return 5 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
