"""Speed: arithmetic of the verdict, and noise that is caught with really running processes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from svdexport.core.machine import usable_cores
from svdexport.core.measures import Measured, Sample, SpeedSettings, Speedup
from svdexport.errors import EXIT_NOISY, EXIT_OK, EXIT_SPEED, RecipeError
from svdexport.recipe import Gates
from svdexport.runtimes.base import Runtime
from svdexport.verify import bootstrap, noise, speed
from svdexport.verify.gate import judge
from tests.unit.small_runtime import SmallRuntime

SETTINGS = SpeedSettings(threads=1, rounds=9, prefill=(64,), decode=8)


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that each keep a core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def wait_until_idle(seconds: float = 20.0) -> None:
    """Wait for a second in which the machine is idle; skip the test where none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if psutil.cpu_percent(interval=1.0) < 3.0:
            return
    pytest.skip("other work keeps this machine busy: silence cannot be tested here")


def pair_of_runtimes(folder: Path, threads: int, width: int = 256) -> list[SmallRuntime]:
    dense = SmallRuntime(folder / "dense", width=width, layers=6, threads=threads)
    low = SmallRuntime(folder / "pair", width=width, layers=6, rank=width // 8, threads=threads)
    return [dense, low]


def samples_of(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[SmallRuntime, str, int], float],
    disturbed: Callable[[int], bool] = lambda number: False,
) -> None:
    """Samples that take no time: seconds by runtime, metric and number of the sample, and whether
    something disturbed it."""
    numbers = itertools.count()

    def sample(runtime: SmallRuntime, metric: speed._Metric, threads: int, part: int) -> Sample:
        number = next(numbers)
        took, bad = seconds(runtime, metric.name, number), disturbed(number)
        return Sample(took, took, took, 0.0, 0.0, 0.0, 0, bad, "x" * bad, part)

    monkeypatch.setattr(speed, "_sample", sample)


@pytest.mark.slow
def test_busy_loop_on_each_core_is_inconclusive(tmp_path: Path) -> None:
    runtimes = pair_of_runtimes(tmp_path, usable_cores())
    settings = dataclasses.replace(SETTINGS, threads=usable_cores())
    with busy_loops(usable_cores()):
        report = speed.measure(runtimes, settings)
    assert report.verdict == "inconclusive"
    gates = Gates(min_prefill_speedup=0.001, min_decode_speedup=0.001)  # passed by any ratio
    _, verdict = judge(gates, [Measured("low", 1, speed=report.artifacts[1])])
    assert verdict.exit_code == EXIT_NOISY
    for timing in report.artifacts[1].timings:
        assert timing.verdict == "inconclusive"
        assert timing.disturbed_rounds > len(timing.samples) / 3
        assert any("other processes used" in s.why for s in timing.samples)


@pytest.mark.slow
def test_idle_machine_is_not_called_noisy(tmp_path: Path) -> None:
    """A few tries: other work on a shared machine may come up in the middle of one."""
    runtimes = pair_of_runtimes(tmp_path, usable_cores(), width=512)
    settings = dataclasses.replace(SETTINGS, threads=usable_cores())
    for _ in range(3):
        wait_until_idle()
        report = speed.measure(runtimes, settings)
        if report.verdict == "ok":
            break
    candidate = report.artifacts[1]
    assert report.verdict == "ok", candidate
    assert candidate.prefill_speedup is not None
    assert candidate.prefill_speedup.low > 1.0


@pytest.mark.parametrize(
    ("times", "noisy", "word", "code"),
    [
        (2.0, False, "slower", EXIT_SPEED),
        (0.5, False, "ok", EXIT_OK),
        (1.0, False, "ok", EXIT_OK),
        (0.5, True, "inconclusive", EXIT_NOISY),
        (2.0, True, "inconclusive", EXIT_NOISY),
    ],
)
def test_the_verdict_follows_the_samples(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: float,
    noisy: bool,
    word: str,
    code: int,
) -> None:
    """A second file that takes so many times as long as the first one."""
    dense, other = pair_of_runtimes(tmp_path, 1, width=8)
    samples_of(
        monkeypatch,
        lambda runtime, *_: times if runtime is other else 1.0,
        lambda number: noisy and number % 6 > 1,  # two rounds of three
    )
    report = speed.measure([dense, other], SETTINGS)
    assert report.verdict == report.artifacts[1].verdict == word
    assert all(len(timing.samples) >= speed.MIN_ROUNDS for timing in report.artifacts[1].timings)
    speedups = (report.artifacts[1].prefill_speedup, report.artifacts[1].decode_speedup)
    assert speedups == (Speedup(1 / times, 1 / times, 1 / times),) * 2
    gates = Gates(min_prefill_speedup=1.0, min_decode_speedup=1.0)
    _, verdict = judge(gates, [Measured("other", 1, speed=report.artifacts[1])])
    assert verdict.exit_code == code


def test_report_keeps_raw_samples_and_the_keys_of_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = pair_of_runtimes(tmp_path, 1, width=8)
    samples_of(
        monkeypatch,
        lambda runtime, _, number: (1 + 0.01 * (number % 5)) / (1 + runtimes.index(runtime)),
        lambda number: number % 7 == 3,
    )
    report = speed.measure(runtimes, SETTINGS)
    base, candidate = report.artifacts
    assert base.prefill_speedup is None and base.verdict is None and base.baseline is None
    assert candidate.baseline == base.path and candidate.bytes == 5
    data = dataclasses.asdict(candidate)
    assert set(data["prefill_speedup"]) == {"median", "low", "high"}
    for timing_a, timing_b in zip(base.timings, candidate.timings, strict=True):
        assert 3 <= len(timing_a.samples) == len(timing_b.samples) <= 6 * SETTINGS.rounds
        marked = [s.disturbed for s in timing_b.samples]
        assert timing_b.disturbed_rounds == sum(marked) > 0
        assert [s.disturbed for s in timing_a.samples] == marked
        used = [i for i, bad in enumerate(marked) if not bad]
        assert 2 <= len(used) < len(marked)
        ratios = [timing_a.samples[i].seconds / timing_b.samples[i].seconds for i in used]
        assert timing_b.speedup is not None
        assert timing_b.speedup.median == pytest.approx(np.median(ratios))
        seconds = np.median([timing_b.samples[i].seconds for i in used])
        assert timing_b.tps == pytest.approx(timing_b.tokens / seconds)


def test_short_calls_are_repeated_until_a_sample_can_be_judged(tmp_path: Path) -> None:
    took: list[float] = []

    def call(runtime: Runtime) -> float:
        took.append(runtime.prefill(np.arange(8)))
        return took[-1]

    runtime = SmallRuntime(tmp_path / "small", width=16)
    sample = speed._sample(runtime, speed._Metric("prefill_8", 8, call), 1, 3)
    assert len(took) > 1
    assert sample.span >= max(speed.MIN_SAMPLE_SECONDS, sum(took))
    assert sample.seconds == pytest.approx(np.mean(took))
    assert sample.part == 3


@pytest.mark.parametrize(
    ("interval", "disturbed", "word"),
    [
        ((1.5, 1.4, 1.6), 0, "ok"),
        ((1.5, 1.4, 1.6), 3, "ok"),
        ((1.5, 1.4, 1.6), 4, "inconclusive"),
        ((0.8, 0.7, 0.9), 0, "slower"),
        ((0.8, 0.7, 0.9), 4, "inconclusive"),
        ((0.7, 0.65, 0.8), 0, "slower"),
        ((0.7, 0.65, 0.8), 4, "inconclusive"),
        ((0.96, 0.75, 0.97), 0, "slower"),
        ((0.96, 0.94, 0.97), 0, "slower"),
        ((1.2, 1.05, 1.3), 0, "inconclusive"),
        ((1.2, 1.15, 1.25), 0, "ok"),
        ((1.0, 0.99, 1.01), 0, "ok"),
        ((1.1, 0.8, 1.4), 0, "inconclusive"),
        ((0.99, 0.985, 0.995), 0, "ok"),
    ],
)
def test_verdict_of_an_interval(
    interval: tuple[float, float, float], disturbed: int, word: str
) -> None:
    assert speed.judge(Speedup(*interval), disturbed, 9) == word


def test_too_few_rounds_give_figures_and_no_verdict(tmp_path: Path) -> None:
    report = speed.measure(
        pair_of_runtimes(tmp_path, 1, width=8), dataclasses.replace(SETTINGS, rounds=1)
    )
    assert report.verdict == "inconclusive" and "too few" in report.notes[0]
    assert report.artifacts[1].decode_tps > 0
    for sample in (s for a in report.artifacts for t in a.timings for s in t.samples):
        assert sample.span >= max(sample.seconds, speed.MIN_SAMPLE_SECONDS) > 0
        assert sample.seconds > 0
    assert speed.judge(Speedup(1.5, 1.4, 1.6), 0, 8) == "inconclusive"


def test_worst_verdict_wins() -> None:
    assert speed.worst(["ok", "inconclusive", "slower"]) == "slower"
    assert speed.worst(["ok", "inconclusive"]) == "inconclusive"
    assert speed.worst([]) == "ok"


def test_a_disturbed_round_is_left_out_of_the_ratio(tmp_path: Path) -> None:
    def sample(seconds: float, disturbed: bool = False) -> Sample:
        return Sample(seconds, seconds, seconds, 0.0, 0.0, 0.0, 0, disturbed, "x" * disturbed)

    metric = speed._Metric("decode_8", 8, lambda r: 0.0)
    rounds = [[sample(2.0), sample(1.0)] for _ in range(8)] + [[sample(2.0), sample(9.0, True)]]
    timing = speed._timing(1, metric, rounds, 0)
    assert timing.speedup == Speedup(2.0, 2.0, 2.0)
    assert timing.tps == 8.0
    assert timing.disturbed_rounds == 1 and timing.verdict == "ok"
    baseline = speed._timing(0, metric, rounds, 0)
    assert baseline.samples[-1].disturbed and baseline.samples[-1].why == "its round was disturbed"


@pytest.mark.parametrize(
    ("pattern", "seconds", "enough"),
    [
        ("." * 9, 1.0, True),
        ("." * 8, 1000.0, False),
        ("x" * 6, 1.0, False),
        ("x" * 7, 1.0, True),
        (".xxx....x....", 1.0, True),
        (".xxx....x...", 1.0, False),
        ("xxx", 29.0, False),
        ("xxx", 31.0, True),
        ("xx.", 31.0, False),
    ],
)
def test_when_rounds_end(pattern: str, seconds: float, enough: bool) -> None:
    rounds = [[Sample(1, 1, 1, 0, 0, 0, 0, mark == "x")] for mark in pattern]
    assert speed._enough(rounds, 9, seconds) is enough


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 0}, "rounds and prefill lengths must be 1 or more"),
        ({"threads": 0}, "rounds and prefill lengths must be 1 or more"),
        ({"prefill": ()}, "rounds and prefill lengths must be 1 or more"),
        ({"prefill": (64, 0)}, "rounds and prefill lengths must be 1 or more"),
        ({"decode": -1}, "must be 1 or more, decode 0"),
        ({"threads": 2}, "dense: opened with 1 threads, to be measured with 2"),
    ],
)
def test_settings_that_cannot_give_a_verdict_are_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    runtimes = pair_of_runtimes(tmp_path, 1, width=8)
    with pytest.raises(RecipeError, match=words):
        speed.measure(runtimes, dataclasses.replace(SETTINGS, **change))  # type: ignore[arg-type]


def test_bootstrap_equals_the_plain_loop() -> None:
    values = np.random.default_rng(3).normal(1.3, 0.1, 11)
    rng = np.random.default_rng(7)
    medians = [np.median(values[rng.integers(0, 11, (1, 11))[0]]) for _ in range(bootstrap.DRAWS)]
    got = bootstrap.median_interval(values, 7)
    assert got.median == np.median(values)
    # one generator filled row by row draws the same stream as one call
    assert got.low == pytest.approx(np.percentile(medians, 2.5))
    assert got.high == pytest.approx(np.percentile(medians, 97.5))
    assert got == bootstrap.median_interval(values, 7)


def test_rounds_come_in_parts_and_files_are_loaded_anew_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = pair_of_runtimes(tmp_path, 1, width=8)
    samples_of(monkeypatch, lambda *_: 1.0)
    report = speed.measure(runtimes, dataclasses.replace(SETTINGS, rounds=10))
    assert runtimes[0].reloads == runtimes[1].reloads == speed.PARTS - 1
    for timing in report.artifacts[1].timings:
        parts = [sample.part for sample in timing.samples]
        assert parts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_rounds_that_are_all_disturbed_end_before_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = pair_of_runtimes(tmp_path, 1, width=8)
    samples_of(monkeypatch, lambda *_: 1.0, lambda number: True)
    report = speed.measure(runtimes, dataclasses.replace(SETTINGS, rounds=10))
    for timing in report.artifacts[1].timings:
        assert timing.disturbed_rounds == len(timing.samples) == speed.HOPELESS
        assert [sample.part for sample in timing.samples] == [0, 0, 1, 1, 2, 2]
    assert runtimes[0].reloads == runtimes[1].reloads == 2


def rounds_of(ratios: list[list[float]], disturbed: int = 0) -> list[list[Sample]]:
    """Rounds of a baseline and one artifact, with these ratios in each part."""
    rounds = []
    for part, values in enumerate(ratios):
        for ratio in values:
            bad = len(rounds) < disturbed
            rounds.append(
                [Sample(t, t, t, 0, 0, 0, 0, bad, "x" * bad, part) for t in (1.0, 1.0 / ratio)]
            )
    return rounds


def test_a_wide_interval_asks_for_another_part_and_a_narrow_one_does_not() -> None:
    narrow = rounds_of([[1.20, 1.21, 1.20], [1.21, 1.20, 1.22], [1.20, 1.19, 1.20]])
    wide = rounds_of([[1.20, 1.21, 1.20], [1.21, 1.20, 1.22], [1.05, 1.04, 1.06]])
    assert not speed._another_part(narrow, 3, 3, SETTINGS)
    assert speed._another_part(wide, 3, 3, SETTINGS)
    assert speed._another_part(narrow[:3], 1, 3, SETTINGS)  # planned
    # noise that is marked, and too few rounds, are not mended by more
    assert not speed._another_part(
        rounds_of([[1.2] * 3, [1.2] * 3, [1.0] * 3], disturbed=4), 3, 3, SETTINGS
    )
    assert speed._another_part(rounds_of([[1.2] * 2], disturbed=2), 1, 5, SETTINGS)
    assert not speed._another_part(rounds_of([[1.2] * 2] * 3, disturbed=6), 3, 5, SETTINGS)
    few = dataclasses.replace(SETTINGS, rounds=6)
    assert not speed._another_part(rounds_of([[1.2] * 2, [1.1] * 2, [1.0] * 2]), 3, 3, few)


def test_parts_are_added_while_the_interval_stays_wide_and_then_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of the second file take a time that changes with every load; its steps do not."""
    dense, other = pair_of_runtimes(tmp_path, 1, width=8)

    def seconds(runtime: SmallRuntime, metric: str, number: int) -> float:
        unsteady = runtime is other and metric == "prefill_64"
        return 1.5 ** -(runtime.reloads % 2) if unsteady else 1.0

    samples_of(monkeypatch, seconds)
    said: list[tuple[str, int, int]] = []
    report = speed.measure([dense, other], SETTINGS, lambda *step: said.append(step))
    prefill, decode = report.artifacts[1].timings
    assert [sample.part for sample in decode.samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert decode.verdict == "ok"
    assert {sample.part for sample in prefill.samples} == set(range(speed.MAX_PARTS))
    assert len(prefill.samples) == 27 and prefill.verdict == "inconclusive"
    assert said[0] == ("prefill_64", 0, 9) and said[-1] == ("prefill_64", 26, 27)
    assert all(done < planned for _, done, planned in said)


def test_every_other_round_runs_backwards(tmp_path: Path) -> None:
    runtimes = pair_of_runtimes(tmp_path, 1, width=8)
    order: list[SmallRuntime] = []

    def call(runtime: Runtime) -> float:
        order.append(runtime)  # type: ignore[arg-type]
        time.sleep(speed.MIN_SAMPLE_SECONDS)
        return 1.0 if runtime is runtimes[0] else 2.0

    metric = speed._Metric("prefill_1", 1, call)
    rounds = [speed._round(runtimes, metric, 1, 0, backwards) for backwards in (False, True)]
    assert [runtimes.index(runtime) for runtime in order] == [0, 1, 1, 0]
    assert [[s.seconds for s in samples] for samples in rounds] == [[1.0, 2.0]] * 2


def test_the_interval_holds_what_parts_differ_by() -> None:
    """Rounds of a part that agree with each other say nothing about the next part."""
    rng = np.random.default_rng(0)
    values = np.concatenate([center + rng.normal(0, 0.002, 5) for center in (1.1, 1.2, 1.3)])
    parts = [0] * 5 + [1] * 5 + [2] * 5
    together, alone = (bootstrap.median_interval(values, 3, p) for p in (parts, None))
    assert together.median == alone.median
    assert together.low < 1.105 and together.high > 1.295
    one = bootstrap.median_interval(values[:5], 3, parts[:5])
    assert one == bootstrap.median_interval(values[:5], 3)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap.median_interval(rng.normal(2.0, 0.1, 15), seed)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 1.0


def test_spread_of_a_mean_is_the_textbook_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 1, 40)
    got = bootstrap.spread(40, lambda i: float(values[i].mean()), 0)
    assert got.stderr == pytest.approx(values.std() / np.sqrt(40), rel=0.06)
    assert got.low < values.mean() < got.high
    with pytest.raises(ValueError, match="two windows"):
        bootstrap.spread(1, lambda i: 0.0, 0)


def test_own_work_is_not_taken_for_noise() -> None:
    before = noise.snapshot()
    end = time.perf_counter() + 0.4
    while time.perf_counter() < end:
        pass
    delta = noise.change(before, noise.snapshot())
    assert delta.own == pytest.approx(delta.wall - delta.waited - delta.steal, abs=0.1)
    assert delta.other <= delta.wall * usable_cores() - delta.own + 0.05
    assert not delta.blind


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_waiting_for_a_core_is_seen() -> None:
    with busy_loops(usable_cores()):
        before = noise.snapshot()
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        delta = noise.change(before, noise.snapshot())
    assert delta.waited > 0.1 * delta.wall
    assert "waited for a core" in noise.why_disturbed(delta, 1)


def test_probe_sees_busy_loops_without_any_counter() -> None:
    with busy_loops(2 * usable_cores()):
        starved = max(noise.probe(usable_cores(), 0.2) for _ in range(3))
    assert starved > noise.MAX_STARVED


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("other", 1.0, "other processes"),
        ("waited", 0.2, "waited"),
        ("steal", 0.2, "hypervisor"),
        ("throttled", 0.1, "quota"),
    ],
)
def test_each_counter_marks_a_sample(field: str, value: float, word: str) -> None:
    quiet = noise.Change(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3, False)
    cores = usable_cores()
    assert noise.why_disturbed(quiet, cores) == ""
    loud = dataclasses.replace(quiet, **{field: value * cores})
    assert word in noise.why_disturbed(loud, cores)
    assert "probe" in noise.why_disturbed(quiet, cores, starved=0.5)


def test_blind_counters_are_noticed() -> None:
    zero = noise.Snapshot(0.0, 0.0, 0.0, 0.0, {}, 0.0, 0)
    later = dataclasses.replace(zero, wall=1.0, own=1.0)
    assert noise.change(zero, later).blind
    assert not noise.change(zero, dataclasses.replace(later, busy=1.0)).blind


def test_ended_and_new_threads_do_not_break_the_sum() -> None:
    before = noise.Snapshot(0.0, 0.0, 0.0, 0.0, {"1": 5.0, "2": 1.0}, 0.0, 0)
    after = noise.Snapshot(1.0, 0.0, 0.0, 0.0, {"1": 5.5, "3": 0.25}, 0.0, 0)
    assert noise.change(before, after).waited == pytest.approx(0.75)


def test_affinity_is_respected() -> None:
    if not hasattr(os, "sched_setaffinity") or usable_cores() < 2:
        pytest.skip("needs two cores and an affinity mask")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
        one = noise._cores()[0]
    finally:
        os.sched_setaffinity(0, allowed)
    assert one < noise._cores()[0]
