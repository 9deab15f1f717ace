"""Speed that can be believed: interleaved rounds, ratios round by round, and noise that is told.

The artifacts are loaded side by side. For each metric (each prefill length, then decode) they are
warmed up and then timed in turn, A B B A A B ..., so that a slow phase of the machine hits all of
them alike; the ratio is taken within a round. A round in which anything else disturbed any of
them is marked (see `noise`) and repeated, up to twice the number of rounds asked for. Where more
than a third of the rounds is marked, the metric's verdict is `inconclusive`, whatever its ratio.

The rounds come in five parts, and before each the artifacts are loaded anew: where their memory
happens to lie, and how fast the machine happens to be for a minute, moves a ratio by more than
rounds side by side differ. The interval is one over parts and rounds. Where it is wide (other
guests of a server, its clock and its memory leave no mark in any counter), further parts follow;
one that is still wide after the last holds no limit that it is near to: the verdict is then
`inconclusive`, and never `ok`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from svdexport.core.machine import describe, no_garbage_collection, usable_cores
from svdexport.core.measures import (
    ArtifactSpeed,
    Sample,
    SpeedReport,
    SpeedSettings,
    Speedup,
    SpeedWord,
    Timing,
)
from svdexport.errors import RecipeError
from svdexport.runtimes.artifact import size_bytes
from svdexport.runtimes.base import Runtime
from svdexport.verify import noise
from svdexport.verify.bootstrap import median_interval

MIN_ROUNDS = 9
PARTS = 5
MAX_PARTS = 15
MAX_DISTURBED = 1 / 3
# Widths of an interval as shares of its median: parts are added until it is narrow, so that the
# medians of two runs agree within 5 %. One that stays wide shows noise.
NARROW = 0.05
WIDE = 0.10
# An interval that lies above this is "not slower": a file against itself must not come out as
# slower or undecided because of one percent of jitter.
SAME = 0.98
# /proc/stat counts in steps of 10 ms; below 0.2 s on two cores a step is over 2 % of the sample.
MIN_SAMPLE_SECONDS = 0.2
# Threads of one runtime spin for a while after their work; the next sample must not pay for it.
SETTLE_SECONDS = 0.03
DECODE_PROMPT = 32
# So many rounds, all of them disturbed, end a metric: half a second of noise alone does not.
HOPELESS = 6
# Time after which three rounds, all of them disturbed, end a metric.
PATIENCE_SECONDS = 30.0

_ORDER: dict[SpeedWord, int] = {"ok": 0, "inconclusive": 1, "slower": 2}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Metric:
    name: str
    tokens: int
    call: Callable[[Runtime], float]


def measure(
    runtimes: Sequence[Runtime], settings: SpeedSettings, progress: Progress | None = None
) -> SpeedReport:
    """Time runtimes side by side; index 0 is the baseline.

    Args:
        runtimes: loaded artifacts, each opened with `settings.threads` threads.
        settings: lengths in tokens, rounds (below 9 the verdict is `inconclusive`), seed of
            prompts and bootstrap.
        progress: called with the metric's name, rounds done and rounds planned.

    Raises RecipeError for settings that cannot give a verdict.
    """
    _check(runtimes, settings)
    metrics = _metrics(runtimes, settings)
    gc.collect()
    with no_garbage_collection():
        rounds = _measure_parts(runtimes, metrics, settings, progress)
    tables = [
        [_timing(i, metric, rounds[metric.name], settings.seed) for i in range(len(runtimes))]
        for metric in metrics
    ]
    artifacts = tuple(
        _artifact(i, runtimes, [table[i] for table in tables]) for i in range(len(runtimes))
    )
    words: list[SpeedWord] = [a.verdict for a in artifacts if a.verdict is not None]
    notes = []
    if settings.threads > usable_cores():
        notes.append(f"{settings.threads} threads share {usable_cores()} cores")
    if settings.rounds < MIN_ROUNDS:
        notes.append(f"{settings.rounds} rounds are too few for a verdict: {MIN_ROUNDS} at least")
    return SpeedReport(artifacts, worst(words), settings, describe(), tuple(notes))


def worst(words: Sequence[SpeedWord]) -> SpeedWord:
    """`slower` was shown, so it wins over `inconclusive`, which wins over `ok`."""
    return max(words, key=_ORDER.__getitem__, default="ok")


def judge(speedup: Speedup, disturbed: int, rounds: int) -> SpeedWord:
    """Verdict of a metric: `slower` where the whole interval lies below 1, `ok` where it lies
    above `SAME` and is clear of 1; `inconclusive` where it holds both, where it is wide and near 1
    from above, and for disturbed or too few rounds."""
    if too_disturbed(disturbed, rounds) or rounds < MIN_ROUNDS:
        return "inconclusive"
    if speedup.high < 1.0 and speedup.low < SAME:
        return "slower"
    return "ok" if speedup.low >= SAME and clear_of(speedup, 1.0) else "inconclusive"


def too_disturbed(disturbed: int, rounds: int) -> bool:
    """Whether so many rounds were disturbed that their ratio says nothing."""
    return disturbed > MAX_DISTURBED * rounds


def clear_of(speedup: Speedup, limit: float) -> bool:
    """Whether the interval is no wider than `WIDE`, or lies farther above the limit than it is
    wide: another run's wide interval may well lie on the other side."""
    return _width(speedup) <= WIDE or speedup.low - limit >= speedup.high - speedup.low


def _width(speedup: Speedup) -> float:
    """Of the interval, as a share of the median."""
    return (speedup.high - speedup.low) / speedup.median


def _check(runtimes: Sequence[Runtime], settings: SpeedSettings) -> None:
    if not runtimes:
        raise RecipeError("speed: nothing to measure")
    if (
        settings.threads < 1
        or settings.rounds < 1
        or settings.decode < 0
        or not settings.prefill
        or min(settings.prefill) < 1
    ):
        raise RecipeError("speed: threads, rounds and prefill lengths must be 1 or more, decode 0")
    for runtime in runtimes:
        if runtime.threads != settings.threads:
            raise RecipeError(
                f"{runtime.path}: opened with {runtime.threads} threads, to be measured with "
                f"{settings.threads}"
            )


def _metrics(runtimes: Sequence[Runtime], settings: SpeedSettings) -> list[_Metric]:
    vocab = min(runtime.vocab_size for runtime in runtimes)
    rng = np.random.default_rng(settings.seed)
    metrics = []
    for length in settings.prefill:
        tokens = rng.integers(0, vocab, length, dtype=np.int64)
        metrics.append(_Metric(f"prefill_{length}", length, lambda r, t=tokens: r.prefill(t)))  # type: ignore[misc]
    prompt = rng.integers(0, vocab, DECODE_PROMPT, dtype=np.int64)
    count = settings.decode
    if not count:
        return metrics  # an encoder
    metrics.append(_Metric(f"decode_{count}", count, lambda r: r.decode(prompt, count)))
    return metrics


def _measure_parts(
    runtimes: Sequence[Runtime],
    metrics: Sequence[_Metric],
    settings: SpeedSettings,
    progress: Progress | None,
) -> dict[str, list[list[Sample]]]:
    """Rounds by metric, a sample for each runtime in each."""
    found: dict[str, list[list[Sample]]] = {metric.name: [] for metric in metrics}
    planned = min(PARTS, settings.rounds)
    for part in range(MAX_PARTS):
        asked = math.ceil((settings.rounds - part % planned) / planned)
        wanted = [m for m in metrics if _another_part(found[m.name], part, planned, settings)]
        if not wanted:
            break
        if part:
            for runtime in runtimes:
                runtime.reload()
        for metric in wanted:
            rounds = found[metric.name]
            tell = partial(_tell, progress, metric.name, len(rounds), asked, settings.rounds)
            rounds += _measure_rounds(runtimes, metric, settings.threads, part, asked, tell)
    return found


def _another_part(
    rounds: list[list[Sample]], part: int, planned: int, settings: SpeedSettings
) -> bool:
    """Whether a metric wants one more part: all that are planned, then until the interval of each
    artifact is narrow. Noise that is seen, and too few rounds, are not mended by more of them."""
    if part < planned:
        return len(rounds) < HOPELESS or not all(map(_disturbed, rounds))
    if settings.rounds < MIN_ROUNDS or too_disturbed(sum(map(_disturbed, rounds)), len(rounds)):
        return False
    others = range(1, len(rounds[0]))
    return any(_width(_speedup(i, rounds, settings.seed)) > NARROW for i in others)


def _disturbed(samples: list[Sample]) -> bool:
    """Whether anything disturbed one of a round's samples."""
    return any(sample.disturbed for sample in samples)


def _tell(
    progress: Progress | None, name: str, before: int, asked: int, planned: int, done: int
) -> None:
    if progress is not None:
        progress(name, before + min(done, asked), max(planned, before + asked))


def _measure_rounds(
    runtimes: Sequence[Runtime],
    metric: _Metric,
    threads: int,
    part: int,
    wanted: int,
    tell: Callable[[int], None],
) -> list[list[Sample]]:
    for runtime in runtimes:
        metric.call(runtime)
        metric.call(runtime)
    rounds: list[list[Sample]] = []
    start = time.monotonic()
    while len(rounds) < 2 * wanted:
        tell(len(rounds))
        rounds.append(_round(runtimes, metric, threads, part, backwards=len(rounds) % 2 == 1))
        if _enough(rounds, wanted, time.monotonic() - start):
            break
    return rounds


def _round(
    runtimes: Sequence[Runtime], metric: _Metric, threads: int, part: int, backwards: bool
) -> list[Sample]:
    """A sample of each runtime; every other round backwards, so that a drift favours none."""
    order = runtimes[::-1] if backwards else runtimes
    samples = [_sample(runtime, metric, threads, part) for runtime in order]
    return samples[::-1] if backwards else samples


def _enough(rounds: list[list[Sample]], wanted: int, seconds: float) -> bool:
    """Whether enough rounds were quiet, or so many were not that more cannot help. Noise can make
    a call a hundred times slower: then a few rounds that are all disturbed have to do."""
    disturbed = sum(map(_disturbed, rounds))
    if len(rounds) - disturbed >= wanted:
        return True
    if seconds > PATIENCE_SECONDS and len(rounds) >= 3 and disturbed == len(rounds):
        return True
    return too_disturbed(disturbed, 2 * wanted)


def _sample(runtime: Runtime, metric: _Metric, threads: int, part: int) -> Sample:
    """Call until the sample is long enough to be judged; a count fixed beforehand could take
    minutes where noise makes each call a hundred times slower."""
    time.sleep(SETTLE_SECONDS)
    seconds: list[float] = []
    before = noise.snapshot()
    while not seconds or time.perf_counter() - before.wall < MIN_SAMPLE_SECONDS:
        seconds.append(metric.call(runtime))
    delta = noise.change(before, noise.snapshot())
    starved = noise.probe(threads) if delta.blind else 0.0
    why = noise.why_disturbed(delta, threads, starved)
    return Sample(
        seconds=sum(seconds) / len(seconds),
        span=delta.wall,
        own_cpu=delta.own,
        other_cpu=delta.other,
        waited=delta.waited,
        steal=delta.steal,
        preempted=delta.preempted,
        disturbed=bool(why),
        why=why,
        part=part,
    )


def _timing(index: int, metric: _Metric, rounds: list[list[Sample]], seed: int) -> Timing:
    """One artifact's timing. A round counts as disturbed for all where it was for one of them."""
    marked = list(map(_disturbed, rounds))
    seconds = float(np.median([r[index].seconds for r in _used(rounds)]))
    samples = tuple(
        r[index]
        if r[index].disturbed or not bad
        else replace(r[index], disturbed=True, why="its round was disturbed")
        for r, bad in zip(rounds, marked, strict=True)
    )
    speedup = None
    verdict: SpeedWord | None = None
    if index > 0:
        speedup = _speedup(index, rounds, seed)
        verdict = judge(speedup, sum(marked), len(rounds))
    return Timing(
        metric.name, metric.tokens, metric.tokens / seconds, speedup, verdict, sum(marked), samples
    )


def _used(rounds: list[list[Sample]]) -> list[list[Sample]]:
    """The rounds that nothing disturbed; all where fewer than two are left."""
    quiet = [samples for samples in rounds if not _disturbed(samples)]
    return quiet if len(quiet) >= 2 else rounds


def _speedup(index: int, rounds: list[list[Sample]], seed: int) -> Speedup:
    used = _used(rounds)
    ratios = [r[0].seconds / r[index].seconds for r in used]
    return median_interval(ratios, seed, [r[0].part for r in used])


def _artifact(index: int, runtimes: Sequence[Runtime], timings: list[Timing]) -> ArtifactSpeed:
    runtime = runtimes[index]
    prefills = [t for t in timings if t.metric.startswith("prefill")]
    prefill = max(prefills, key=lambda t: t.tokens)
    decode = next((t for t in timings if t.metric.startswith("decode")), None)
    words: list[SpeedWord] = [t.verdict for t in timings if t.verdict is not None]
    return ArtifactSpeed(
        path=str(runtime.path),
        runtime=runtime.name,
        bytes=size_bytes(runtime.path),
        baseline=None if index == 0 else str(runtimes[0].path),
        prefill_tps=prefill.tps,
        decode_tps=0.0 if decode is None else decode.tps,
        prefill_speedup=prefill.speedup,
        decode_speedup=None if decode is None else decode.speedup,
        verdict=worst(words) if index > 0 else None,
        timings=tuple(timings),
    )
