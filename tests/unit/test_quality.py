"""Quality figures against slow float64 formulas, and the reference's cache."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdexport.errors import ArtifactError, InputError, ResourceError
from svdexport.verify import generation, quality
from svdexport.verify.reference import ReferenceLogits
from tests.unit.small_runtime import SmallRuntime


def slow_figures(
    candidate: np.ndarray, reference: np.ndarray, tokens: np.ndarray
) -> tuple[float, list[float], float]:
    """Perplexity, KLD per position and share of equal tops, one number at a time with math."""
    nll, klds, same = [], [], 0

    def probabilities(row: np.ndarray) -> list[float]:
        top = max(float(v) for v in row)
        raw = [math.exp(float(v) - top) for v in row]
        return [v / math.fsum(raw) for v in raw]

    for t in range(len(tokens) - 1):
        q, p = probabilities(candidate[t]), probabilities(reference[t])
        nll.append(-math.log(q[tokens[t + 1]]))
        klds.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same += p.index(max(p)) == q.index(max(q))
    return math.exp(math.fsum(nll) / len(nll)), klds, same / len(nll)


@pytest.fixture
def models(tmp_path: Path) -> tuple[SmallRuntime, SmallRuntime]:
    return SmallRuntime(tmp_path / "dense"), SmallRuntime(tmp_path / "noisy", noise=0.2)


@pytest.fixture
def tokens() -> np.ndarray:
    return quality.windows(np.random.default_rng(0).integers(0, 50, 100), 12, 6)


def test_windows_are_consecutive_without_overlap() -> None:
    got = quality.windows(range(100), 8, 3)
    assert got.tolist() == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert len(quality.windows(range(20), 8, 30)) == 2
    with pytest.raises(InputError, match="7 tokens"):
        quality.windows(range(7), 8, 1)
    for context, count in ((1, 1), (2, 0)):
        with pytest.raises(InputError, match=rf"context {context} and windows {count}: need at"):
            quality.windows(range(7), context, count)


def test_figures_equal_the_slow_formulas(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray, tmp_path: Path
) -> None:
    dense, noisy = models
    reference = ReferenceLogits.of(dense, tokens, tmp_path / "work")
    got = quality.evaluate(noisy, tokens, reference)
    slow = [slow_figures(noisy.logits(w), dense.logits(w), w) for w in tokens]
    perplexity = math.exp(np.mean([math.log(s[0]) for s in slow]))
    klds = [k for s in slow for k in s[1]]
    assert got.perplexity == pytest.approx(perplexity, rel=1e-10)
    assert got.mean_kld == pytest.approx(np.mean(klds), rel=1e-9)
    assert got.kld_p999 == pytest.approx(np.quantile(klds, 0.999), rel=1e-9)
    assert got.same_top == pytest.approx(np.mean([s[2] for s in slow]))
    assert (got.tokens, got.windows, got.context) == (66, 6, 12)
    base = quality.evaluate(dense, tokens).perplexity
    assert got.perplexity_ratio == pytest.approx(got.perplexity / base)
    assert got.window_kld == pytest.approx([np.mean(s[1]) for s in slow])
    for name in ("perplexity", "mean_kld", "kld_p999", "same_top", "perplexity_ratio"):
        assert got.spreads[name].low <= getattr(got, name) <= got.spreads[name].high
        assert got.spreads[name].stderr > 0


def test_perplexity_is_torchs_shifted_cross_entropy(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray
) -> None:
    dense, _ = models
    losses = [
        torch.nn.functional.cross_entropy(
            torch.tensor(dense.logits(w)).double()[:-1], torch.tensor(w)[1:]
        ).item()
        for w in tokens
    ]
    got = quality.evaluate(dense, tokens)
    assert got.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-10)
    assert got.mean_kld is None and "mean_kld" not in got.spreads


def test_against_itself_nothing_diverges(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray, tmp_path: Path
) -> None:
    dense, _ = models
    got = quality.evaluate(dense, tokens, ReferenceLogits.of(dense, tokens, tmp_path / "work"))
    assert (got.same_top, got.perplexity_ratio) == (1.0, 1.0)
    assert got.mean_kld == pytest.approx(0.0, abs=1e-12)


def test_chunks_do_not_change_the_figures(
    models: tuple[SmallRuntime, SmallRuntime],
    tokens: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, noisy = models
    reference = ReferenceLogits.of(dense, tokens, tmp_path / "work")
    whole = quality.evaluate(noisy, tokens, reference)
    monkeypatch.setattr(quality, "_CHUNK_NUMBERS", 151)
    assert quality.evaluate(noisy, tokens, reference) == whole


def test_one_window_has_figures_and_no_errors(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray
) -> None:
    got = quality.evaluate(models[0], tokens[:1])
    assert got.spreads == {} and got.perplexity > 1


def test_reference_is_computed_once(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray, tmp_path: Path
) -> None:
    dense, _ = models
    first = ReferenceLogits.of(dense, tokens, tmp_path / "work")
    calls = dense.logit_calls
    second = ReferenceLogits.of(dense, tokens, tmp_path / "work")
    assert dense.logit_calls == calls and second.path == first.path
    np.testing.assert_array_equal(second.window(2), dense.logits(tokens[2])[:-1])
    other = ReferenceLogits.of(dense, tokens + 1 - 1, tmp_path / "work")
    assert other.path == first.path
    assert ReferenceLogits.of(dense, tokens[::-1], tmp_path / "work").path != first.path
    dense.path.write_bytes(b"changed")
    assert ReferenceLogits.of(dense, tokens, tmp_path / "work").path != first.path


def test_cut_off_reference_is_computed_again(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray, tmp_path: Path
) -> None:
    dense, _ = models
    path = ReferenceLogits.of(dense, tokens, tmp_path / "work").path
    path.write_bytes(path.read_bytes()[:-4])
    again = ReferenceLogits.of(dense, tokens, tmp_path / "work")
    np.testing.assert_array_equal(again.window(5), dense.logits(tokens[5])[:-1])


def test_disk_too_small_for_the_reference(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray, tmp_path: Path
) -> None:
    dense, _ = models
    dense.vocab_size = 10**13
    with pytest.raises(ResourceError, match="fewer windows"):
        ReferenceLogits.of(dense, tokens, tmp_path / "work")
    assert not list((tmp_path / "work").glob("*"))


def test_nan_logits_are_named(
    models: tuple[SmallRuntime, SmallRuntime], tokens: np.ndarray
) -> None:
    broken = models[0]
    broken.unembed[3, 3] = float("nan")
    with pytest.raises(ArtifactError, match=r"window 0.*not finite at position 0"):
        quality.evaluate(broken, tokens)


def test_padded_vocabulary_is_cut_and_another_one_refused(tmp_path: Path) -> None:
    tokens = quality.windows(np.random.default_rng(0).integers(0, 400, 60), 10, 4)
    padded = SmallRuntime(tmp_path / "padded", vocab=402)
    plain = SmallRuntime(tmp_path / "plain", vocab=400)
    plain.embed, plain.weights = padded.embed[:400], padded.weights
    plain.unembed = padded.unembed[:400]
    reference = ReferenceLogits.of(plain, tokens, tmp_path / "work")
    assert quality.evaluate(padded, tokens, reference).mean_kld == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="402 tokens"):
        small = SmallRuntime(tmp_path / "other", vocab=300)
        quality.evaluate(padded, tokens % 300, ReferenceLogits.of(small, tokens % 300, tmp_path))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0.01, 60))
def test_log_softmax_is_a_distribution_at_any_scale(vocab: int, seed: int, scale: float) -> None:
    rows = (np.random.default_rng(seed).normal(size=(3, vocab)) * scale).astype(np.float32)
    got = quality.log_softmax(rows)
    np.testing.assert_allclose(np.exp(got).sum(axis=1), 1.0, rtol=1e-12)
    expected = torch.log_softmax(torch.tensor(rows).double(), -1).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 5.0))
def test_divergence_is_never_negative(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(9, 20)).astype(np.float32) * 3
    q = (p + noise * rng.normal(size=p.shape)).astype(np.float32)
    window = rng.integers(0, 20, 9)
    got = quality._score(q, p[:-1], window, "here")
    assert got.kld is not None and got.kld.min() >= 0
    _, slow, _ = slow_figures(q, p, window)
    np.testing.assert_allclose(got.kld, slow, rtol=1e-7, atol=1e-9)


def test_token_the_reference_rules_out_adds_nothing() -> None:
    p = np.array([[0.0, 1.0, -np.inf], [0.0, 0.0, 0.0]], dtype=np.float32)
    q = np.array([[0.0, 1.0, -np.inf], [0.0, 0.0, 0.0]], dtype=np.float32)
    got = quality._score(q, p[:1], np.array([0, 1]), "here")
    assert got.kld is not None and got.kld[0] == pytest.approx(0.0)
    with pytest.raises(ArtifactError, match="divergence"):
        quality._score(q, np.array([[0, 1, 0]], np.float32), np.array([0, 1]), "here")


@given(
    st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=9)
)
def test_repeated_block_is_flagged(prefix: list[int], block: list[int]) -> None:
    assert generation.looks_looping(prefix + block * 12)


@given(st.permutations(list(range(60))))
def test_text_without_repeats_is_not_flagged(tokens: list[int]) -> None:
    assert not generation.looks_looping(tokens)


@pytest.mark.parametrize("tokens", [[], [1], [7, 7, 7, 7], [1, 2, 1, 2, 1, 2], list(range(11)) * 2])
def test_short_repeats_are_not_flagged(tokens: list[int]) -> None:
    assert not generation.looks_looping(tokens)


def test_generation_flags_a_bigram_model(tmp_path: Path) -> None:
    """The small model only knows the last token: greedy, it must run into a cycle."""
    model = SmallRuntime(tmp_path / "model")
    got = generation.generate(model, ("abc", ""), max_new_tokens=200)
    assert len(got) == 1 and got[0].prompt == "abc"
    assert got[0].tokens == 200 and got[0].looping
    assert got[0].text == model.detokenize(model.generate(model.tokenize("abc"), 200))
