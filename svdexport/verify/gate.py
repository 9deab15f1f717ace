"""Gates: what was measured against the recipe's limits, and the exit code that follows.

Every gate takes the pessimistic end of its interval. A speed gate whose rounds were disturbed, or
whose interval is wide and holds the limit or lies just above it, is `inconclusive`: it has not
passed, and has not failed either. A gate that is set but was not measured has not passed; no speed
gate is for a checkpoint.

Exit codes, the first that applies: 3 a file does not hold or compute what was meant (round trip,
parity); 4 a quality gate failed; 5 a speed or size gate failed; 7 a speed gate is inconclusive;
0 all passed. A broken file comes first, since figures taken on it mean nothing; 7 comes last,
since a quiet machine can turn a 7 into a 0 and never a 4 or a 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from svdexport.core.measures import Embeddings, GateResult, Measured, Quality, Timing, Verdict
from svdexport.errors import EXIT_INPUT, EXIT_NOISY, EXIT_OK, EXIT_QUALITY, EXIT_SPEED
from svdexport.recipe import Gates
from svdexport.verify.speed import MIN_ROUNDS, clear_of, too_disturbed

# gate of the recipe -> figure of Quality, and whether more is worse
_QUALITY = {
    "max_perplexity_ratio": ("perplexity_ratio", True),
    "max_mean_kld": ("mean_kld", True),
    "min_same_top": ("same_top", False),
}
_EMBEDDINGS = {"min_cosine": "mean_cosine", "min_rank_correlation": "rank_correlation"}
_SPEED = {"min_prefill_speedup": "prefill", "min_decode_speedup": "decode"}


def judge(gates: Gates, measured: Sequence[Measured]) -> tuple[tuple[GateResult, ...], Verdict]:
    """All gates of all artifacts, and the verdict.

    `measured` are the compressed artifacts that the gates are for; integrity is judged wherever
    it was checked, the other gates where the recipe sets them.
    """
    results = tuple(result for one in measured for result in _gates_of(gates, one))
    return results, verdict(results)


def verdict(results: Sequence[GateResult]) -> Verdict:
    """The exit code of a list of gates, and a sentence for each that did not pass."""
    failed = [r for r in results if not r.passed]
    reasons = tuple(sentence(r) for r in failed)
    kinds = {r.kind for r in failed if not r.inconclusive}
    if "integrity" in kinds:
        return Verdict("fail", EXIT_INPUT, reasons)
    if "quality" in kinds:
        return Verdict("fail", EXIT_QUALITY, reasons)
    if kinds:
        return Verdict("fail", EXIT_SPEED, reasons)
    if failed:
        return Verdict("inconclusive", EXIT_NOISY, reasons)
    return Verdict("pass", EXIT_OK)


def sentence(result: GateResult) -> str:
    """What is wrong with a gate that did not pass."""
    where = f"{result.artifact}: " if result.artifact else ""
    if result.value is None or result.limit is None:
        return f"{where}{result.name}: {result.detail}"
    word = "is inconclusive" if result.inconclusive else "failed"
    why = f" ({result.detail})" if result.detail else ""
    form = ",.0f" if result.kind == "size" else ".4g"
    figures = f"{result.value:{form}} against {result.limit:{form}}"
    return f"{where}{result.name} {word}: {figures}{why}"


def _gates_of(gates: Gates, one: Measured) -> Iterator[GateResult]:
    yield from _integrity(one)
    for name, (figure, upper) in _QUALITY.items():
        limit = getattr(gates, name)
        if limit is not None:
            yield _quality_gate(name, figure, upper, limit, one.path, one.quality)
    for name, figure in _EMBEDDINGS.items():
        limit = getattr(gates, name)
        if limit is not None:
            yield _quality_gate(name, figure, False, limit, one.path, one.embeddings)
    for name, prefix in _SPEED.items():
        limit = getattr(gates, name)
        if limit is not None and one.timed:
            yield _speed_gate(name, prefix, limit, one)
    if gates.max_bytes is not None:
        fits = one.bytes <= gates.max_bytes
        yield GateResult(
            "max_bytes", float(gates.max_bytes), float(one.bytes), fits, "size", one.path
        )


def _integrity(one: Measured) -> Iterator[GateResult]:
    if one.round_trip is not None:
        problems = one.round_trip
        detail = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        yield GateResult(
            "round_trip",
            0.0,
            float(len(problems)),
            not problems,
            "integrity",
            one.path,
            False,
            detail,
        )
    if one.parity is not None:
        parity = one.parity
        yield GateResult(
            "parity",
            parity.max_relative,
            parity.relative,
            parity.passed,
            "integrity",
            one.path,
            False,
            "; ".join(parity.problems),
        )


def _quality_gate(
    name: str, figure: str, upper: bool, limit: float, path: str, found: Quality | Embeddings | None
) -> GateResult:
    value = None if found is None else _pessimistic(found, figure, upper)
    if found is None or value is None:
        return GateResult(name, limit, None, False, "quality", path, False, "was not measured")
    passed = value <= limit if upper else value >= limit
    detail = "" if figure in found.spreads else "one window: no interval"
    return GateResult(name, limit, value, passed, "quality", path, False, detail)


def _pessimistic(quality: Quality | Embeddings, figure: str, upper: bool) -> float | None:
    value: float | None = getattr(quality, figure)
    spread = quality.spreads.get(figure)
    if value is None or spread is None:
        return value
    # a skewed bootstrap may leave the figure itself outside of its interval
    return max(value, spread.high) if upper else min(value, spread.low)


def _speed_gate(name: str, prefix: str, limit: float, one: Measured) -> GateResult:
    """The worst of the metrics of this kind: a failure counts more than an open question."""
    timings = [] if one.speed is None else one.speed.timings
    results = [
        _timing_gate(name, limit, timing, one.path)
        for timing in timings
        if timing.metric.startswith(prefix) and timing.speedup is not None
    ]
    if not results:
        return GateResult(name, limit, None, False, "speed", one.path, False, "was not measured")
    return min(results, key=lambda r: (r.passed, r.inconclusive, r.value))


def _timing_gate(name: str, limit: float, timing: Timing, path: str) -> GateResult:
    assert timing.speedup is not None
    low, high = timing.speedup.low, timing.speedup.high
    rounds = len(timing.samples)
    passed, inconclusive, detail = low >= limit, False, timing.metric
    if too_disturbed(timing.disturbed_rounds, rounds):
        passed, inconclusive = False, True
        detail += f": {timing.disturbed_rounds} of {rounds} rounds were disturbed"
    elif rounds < MIN_ROUNDS:
        passed, inconclusive = False, True
        detail += f": {rounds} rounds are too few"
    elif high >= limit and not clear_of(timing.speedup, limit):
        passed, inconclusive = False, True
        detail += f": the interval from {low:.2f} to {high:.2f} is wide for such a limit"
    return GateResult(name, limit, low, passed, "speed", path, inconclusive, detail)
