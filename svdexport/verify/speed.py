"""Speed that can be believed: interleaved rounds, ratios round by round, and noise that is told.

The artifacts are loaded side by side. For each metric (each prefill length, then decode) they are
warmed up and then timed in turn, A B A B ..., so that a slow phase of the machine hits all of
them alike; the ratio is taken within a round. A round in which anything else disturbed any of
them is marked (see `noise`) and repeated, up to twice the number of rounds asked for. Where more
than a third of the rounds is marked, the metric's verdict is `inconclusive`, whatever its ratio.

The rounds come in three parts, and before each the artifacts are loaded anew: where their memory
happens to lie, and how fast the machine happens to be for a minute, moves a ratio by more than
rounds side by side differ. The interval is one over parts and rounds.
"""

from __future__ import annotations

import gc
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
PARTS = 3
MAX_DISTURBED = 1 / 3
# An interval that lies above this is "not slower": a file against itself must not come out as
# slower or undecided because of one percent of jitter.
SAME = 0.98
# /proc/stat counts in steps of 10 ms; below 0.2 s on two cores a step is over 2 % of the sample.
MIN_SAMPLE_SECONDS = 0.2
# Threads of one runtime spin for a while after their work; the next sample must not pay for it.
SETTLE_SECONDS = 0.03
DECODE_PROMPT = 32
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
    above `SAME`; `inconclusive` where it holds both, and for disturbed or too few rounds."""
    if disturbed > MAX_DISTURBED * rounds or rounds < MIN_ROUNDS:
        return "inconclusive"
    if speedup.low >= SAME:
        return "ok"
    return "slower" if speedup.high < 1.0 else "inconclusive"


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
    parts = min(PARTS, settings.rounds)
    for part in range(parts):
        if part:
            for runtime in runtimes:
                runtime.reload()
        before, upto = (settings.rounds * i // parts for i in (part, part + 1))
        for metric in metrics:
            rounds = found[metric.name]
            if rounds and all(any(s.disturbed for s in r) for r in rounds):
                continue  # more of them would not make it conclusive
            tell = partial(_tell, progress, metric.name, before, upto, settings.rounds)
            rounds += _measure_rounds(runtimes, metric, settings.threads, part, upto - before, tell)
    return found


def _tell(
    progress: Progress | None, name: str, before: int, upto: int, total: int, done: int
) -> None:
    if progress is not None:
        progress(name, min(before + done, upto), total)


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
        rounds.append([_sample(runtime, metric, threads, part) for runtime in runtimes])
        if _enough(rounds, wanted, time.monotonic() - start):
            break
    return rounds


def _enough(rounds: list[list[Sample]], wanted: int, seconds: float) -> bool:
    """Whether enough rounds were quiet, or so many were not that more cannot help. Noise can make
    a call a hundred times slower: then a few rounds that are all disturbed have to do."""
    disturbed = sum(any(s.disturbed for s in r) for r in rounds)
    if len(rounds) - disturbed >= wanted:
        return True
    if seconds > PATIENCE_SECONDS and len(rounds) >= 3 and disturbed == len(rounds):
        return True
    return disturbed > MAX_DISTURBED * 2 * wanted


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
    marked = [any(s.disturbed for s in r) for r in rounds]
    quiet = [r for r, bad in zip(rounds, marked, strict=True) if not bad]
    used = quiet if len(quiet) >= 2 else rounds
    seconds = float(np.median([r[index].seconds for r in used]))
    samples = tuple(
        r[index]
        if r[index].disturbed or not bad
        else replace(r[index], disturbed=True, why="its round was disturbed")
        for r, bad in zip(rounds, marked, strict=True)
    )
    speedup = None
    verdict: SpeedWord | None = None
    if index > 0:
        ratios = [r[0].seconds / r[index].seconds for r in used]
        speedup = median_interval(ratios, seed, [r[0].part for r in used])
        verdict = judge(speedup, sum(marked), len(rounds))
    return Timing(
        metric.name, metric.tokens, metric.tokens / seconds, speedup, verdict, sum(marked), samples
    )


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
