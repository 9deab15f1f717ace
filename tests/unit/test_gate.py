"""Gates take the pessimistic end, and the exit code follows a fixed order."""

from __future__ import annotations

import dataclasses

import pytest

from svdexport.core.measures import (
    ArtifactSpeed,
    Embeddings,
    GateResult,
    Measured,
    Parity,
    Quality,
    Sample,
    Speedup,
    Spread,
    Timing,
)
from svdexport.errors import EXIT_INPUT, EXIT_NOISY, EXIT_OK, EXIT_QUALITY, EXIT_SPEED
from svdexport.recipe import Gates
from svdexport.verify import gate

PARITY = Parity(0.99, 0.1, 0.01, 3.0, 0.01, 0.02, 96, 0.85, 0.12)
GOOD = Gates(
    max_perplexity_ratio=1.5,
    max_mean_kld=0.3,
    min_same_top=0.7,
    min_prefill_speedup=1.1,
    min_decode_speedup=1.1,
    max_bytes=1000,
)


def timing(metric: str, low: float, high: float, disturbed: int = 0, rounds: int = 9) -> Timing:
    samples = tuple(Sample(1, 1, 1, 0, 0, 0, 0, i < disturbed) for i in range(rounds))
    middle = (low + high) / 2
    return Timing(metric, 8, 8.0, Speedup(middle, low, high), "ok", disturbed, samples)


def speed(*timings: Timing) -> ArtifactSpeed:
    return ArtifactSpeed("m", "llama.cpp", 900, "d", 8.0, 8.0, None, None, "ok", timings)


def measured() -> Measured:
    quality = Quality(
        perplexity=12.0,
        tokens=100,
        windows=4,
        context=26,
        mean_kld=0.2,
        kld_p999=1.0,
        same_top=0.8,
        perplexity_ratio=1.3,
        spreads={
            "perplexity_ratio": Spread(0.05, 1.2, 1.4),
            "mean_kld": Spread(0.01, 0.18, 0.22),
            "same_top": Spread(0.02, 0.76, 0.84),
        },
    )
    fast = speed(
        timing("prefill_128", 1.3, 1.35),
        timing("prefill_512", 1.2, 1.25),
        timing("decode_64", 1.15, 1.2),
    )
    return Measured("m", 900, quality, fast, PARITY, ())


def named(results: tuple[GateResult, ...], name: str) -> GateResult:
    return next(r for r in results if r.name == name)


def test_all_gates_pass_with_their_pessimistic_values() -> None:
    results, verdict = gate.judge(GOOD, [measured()])
    assert (verdict.word, verdict.exit_code, verdict.reasons) == ("pass", EXIT_OK, ())
    values = {r.name: r.value for r in results}
    assert values == {
        "round_trip": 0.0,
        "parity": 0.01,
        "max_perplexity_ratio": 1.4,
        "max_mean_kld": 0.22,
        "min_same_top": 0.76,
        "min_prefill_speedup": 1.2,
        "min_decode_speedup": 1.15,
        "max_bytes": 900.0,
    }


def test_gates_that_the_recipe_leaves_out_are_not_judged() -> None:
    results, verdict = gate.judge(Gates(), [measured()])
    assert [r.name for r in results] == ["round_trip", "parity"] and verdict.exit_code == EXIT_OK
    assert gate.judge(Gates(), [Measured("m", 9)])[0] == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"max_perplexity_ratio": 1.35}, EXIT_QUALITY),
        ({"max_mean_kld": 0.21}, EXIT_QUALITY),
        ({"min_same_top": 0.77}, EXIT_QUALITY),
        ({"min_prefill_speedup": 1.26}, EXIT_SPEED),
        ({"min_decode_speedup": 1.17}, EXIT_SPEED),
        ({"max_bytes": 899}, EXIT_SPEED),
        ({"max_bytes": 899, "max_mean_kld": 0.21}, EXIT_QUALITY),
    ],
)
def test_limit_inside_the_interval_fails(change: dict[str, float], code: int) -> None:
    """Each limit would pass at the middle of its interval."""
    results, verdict = gate.judge(GOOD.model_copy(update=change), [measured()])
    assert verdict.word == "fail" and verdict.exit_code == code
    failed = [r.name for r in results if not r.passed]
    assert failed == [name for name in failed if name in change] and failed
    assert all(any(name in reason for reason in verdict.reasons) for name in failed)


def test_disturbed_rounds_are_inconclusive_however_good_the_ratio() -> None:
    noisy = speed(timing("prefill_128", 5.0, 5.1, disturbed=4), timing("decode_64", 5.0, 5.1))
    results, verdict = gate.judge(GOOD, [dataclasses.replace(measured(), speed=noisy)])
    assert (verdict.word, verdict.exit_code) == ("inconclusive", EXIT_NOISY)
    assert named(results, "min_prefill_speedup").inconclusive
    assert named(results, "min_decode_speedup").passed
    assert "4 of 9 rounds were disturbed" in verdict.reasons[0]


def test_failure_on_quiet_rounds_counts_more_than_an_open_question() -> None:
    mixed = speed(
        timing("prefill_128", 5.0, 5.1, disturbed=9),
        timing("prefill_512", 0.8, 0.9),
        timing("decode_64", 5.0, 5.1),
    )
    _, verdict = gate.judge(GOOD, [dataclasses.replace(measured(), speed=mixed)])
    assert verdict.exit_code == EXIT_SPEED


def test_wide_interval_near_the_limit_is_inconclusive() -> None:
    def code(low: float, high: float, rounds: int = 9) -> int:
        one = speed(timing("prefill_128", 2, 2.1), timing("decode_64", low, high, rounds=rounds))
        return gate.judge(GOOD, [dataclasses.replace(measured(), speed=one)])[1].exit_code

    assert code(1.0, 1.4) == EXIT_NOISY
    assert code(1.09, 1.12) == EXIT_SPEED
    assert code(0.7, 1.09) == EXIT_SPEED
    assert code(0.6, 0.8) == EXIT_SPEED
    assert code(1.11, 1.8) == EXIT_NOISY
    assert code(1.5, 1.8) == EXIT_OK
    assert code(1.11, 1.2) == EXIT_OK
    assert code(1.5, 1.6, rounds=5) == EXIT_NOISY


def test_what_was_not_measured_has_not_passed() -> None:
    results, verdict = gate.judge(GOOD, [Measured("m", 900)])
    assert verdict.exit_code == EXIT_QUALITY
    assert [r.name for r in results if r.passed] == ["max_bytes"]
    assert "m: max_mean_kld: was not measured" in verdict.reasons


def test_speed_gates_are_not_for_a_checkpoint_and_all_others_are() -> None:
    untimed = dataclasses.replace(measured(), speed=None)
    assert gate.judge(GOOD, [untimed])[1].exit_code == EXIT_SPEED
    results, verdict = gate.judge(GOOD, [dataclasses.replace(untimed, timed=False)])
    assert verdict.exit_code == EXIT_OK
    everything, _ = gate.judge(GOOD, [untimed])
    left_out = {r.name for r in everything} - {r.name for r in results}
    assert left_out == {"min_prefill_speedup", "min_decode_speedup"}


def test_one_window_is_judged_by_its_figure_and_says_so() -> None:
    one = measured()
    assert one.quality is not None
    bare = dataclasses.replace(one, quality=dataclasses.replace(one.quality, spreads={}))
    results, verdict = gate.judge(GOOD, [bare])
    assert verdict.exit_code == EXIT_OK
    assert named(results, "max_perplexity_ratio").value == 1.3
    assert named(results, "max_perplexity_ratio").detail == "one window: no interval"


def embedded() -> Measured:
    found = Embeddings(
        mean_cosine=0.96,
        low_cosine=0.9,
        rank_correlation=0.92,
        texts=40,
        tokens=900,
        spreads={
            "mean_cosine": Spread(0.01, 0.94, 0.98),
            "low_cosine": Spread(0.02, 0.85, 0.93),
            "rank_correlation": Spread(0.02, 0.88, 0.95),
        },
    )
    return Measured("e", 900, embeddings=found)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, []),
        ({"min_cosine": 0.95}, ["min_cosine"]),
        ({"min_rank_correlation": 0.9}, ["min_rank_correlation"]),
        (
            {"min_cosine": 0.97, "min_rank_correlation": 0.93},
            ["min_cosine", "min_rank_correlation"],
        ),
    ],
)
def test_gates_of_embeddings_take_the_low_end(change: dict[str, float], failed: list[str]) -> None:
    """The first two limits would pass at the figure itself."""
    gates = Gates(**{"min_cosine": 0.94, "min_rank_correlation": 0.88} | change)
    results, verdict = gate.judge(gates, [embedded()])
    assert {r.name: r.value for r in results} == {
        "min_cosine": 0.94,
        "min_rank_correlation": 0.88,
    }
    assert {r.kind for r in results} == {"quality"}
    assert [r.name for r in results if not r.passed] == failed
    assert verdict.exit_code == (EXIT_QUALITY if failed else EXIT_OK)
    assert [reason.split()[1] for reason in verdict.reasons] == failed


def test_embeddings_that_were_not_measured_have_not_passed() -> None:
    """None at all; and a rank correlation of fewer texts than it takes."""
    gates = Gates(min_cosine=0.5, min_rank_correlation=0.5)
    _, verdict = gate.judge(gates, [Measured("e", 900)])
    assert verdict.exit_code == EXIT_QUALITY
    assert verdict.reasons == (
        "e: min_cosine: was not measured",
        "e: min_rank_correlation: was not measured",
    )
    one = embedded()
    assert one.embeddings is not None
    few = dataclasses.replace(one.embeddings, rank_correlation=None, spreads={})
    results, verdict = gate.judge(gates, [dataclasses.replace(one, embeddings=few)])
    assert verdict.exit_code == EXIT_QUALITY
    assert verdict.reasons == ("e: min_rank_correlation: was not measured",)
    assert (named(results, "min_cosine").value, named(results, "min_cosine").passed) == (0.96, True)


def test_broken_file_comes_before_everything() -> None:
    broken = dataclasses.replace(measured(), round_trip=("blk.0: sha256 differs",) * 5)
    _, verdict = gate.judge(GOOD.model_copy(update={"max_mean_kld": 0.01}), [broken])
    assert verdict.exit_code == EXIT_INPUT
    assert "blk.0: sha256 differs" in verdict.reasons[0] and "..." in verdict.reasons[0]
    off = dataclasses.replace(PARITY, problems=("relative difference 0.9 is over 0.12",))
    _, verdict = gate.judge(GOOD, [dataclasses.replace(measured(), parity=off)])
    assert verdict.exit_code == EXIT_INPUT and "relative difference" in verdict.reasons[0]


def test_every_artifact_is_judged() -> None:
    large = dataclasses.replace(measured(), path="large", bytes=2000)
    results, verdict = gate.judge(GOOD, [measured(), large])
    assert verdict.exit_code == EXIT_SPEED
    assert verdict.reasons == ("large: max_bytes failed: 2,000 against 1,000",)
    assert len(results) == 16


def test_skewed_interval_never_beats_the_figure_itself() -> None:
    one = measured()
    assert one.quality is not None
    skewed = dict(one.quality.spreads) | {"mean_kld": Spread(0.01, 0.1, 0.15)}
    odd = dataclasses.replace(one, quality=dataclasses.replace(one.quality, spreads=skewed))
    assert named(gate.judge(GOOD, [odd])[0], "max_mean_kld").value == 0.2
