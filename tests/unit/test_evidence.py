"""What is kept of a parity check says the same as the whole check."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from svdexport.errors import ArtifactError
from svdexport.verify import evidence
from svdexport.verify.parity import FLOAT16, FLOAT32, compare

RNG = np.random.default_rng(3)
LOGITS = (3 * RNG.standard_normal((24, 9000))).astype(np.float32)
TOKENS = RNG.integers(0, 9000, 24)


def without_numbers(problems: tuple[str, ...]) -> list[str]:
    """Kept are those of a part of the vocabulary: figures a little off, and the same lines."""
    return [re.sub(r"\d+(\.\d+)?", "#", line) for line in problems]


@pytest.mark.parametrize("noise", [1e-3, 3e-2, 0.3])
def test_kept_part_gives_the_whole_difference(noise: float, tmp_path: Path) -> None:
    other = LOGITS + noise * RNG.standard_normal(LOGITS.shape).astype(np.float32)
    whole = compare(LOGITS, other, FLOAT16)
    evidence.write(evidence.of(TOKENS, LOGITS, None), tmp_path / "e.safetensors")
    kept = evidence.read(tmp_path / "e.safetensors")
    assert kept.columns.size < 2300
    assert set(LOGITS.argmax(axis=1)) <= set(kept.columns.tolist())
    part = evidence.repeat(kept, other, FLOAT16)
    assert part.relative == pytest.approx(whole.relative, rel=0.1)
    assert without_numbers(part.problems) == without_numbers(whole.problems)
    assert bool(part.problems) == (noise == 0.3)


def test_limits_follow_the_rounded_logits_that_were_kept(tmp_path: Path) -> None:
    rounded = LOGITS + 0.3 * RNG.standard_normal(LOGITS.shape).astype(np.float32)
    other = LOGITS + 0.3 * RNG.standard_normal(LOGITS.shape).astype(np.float32)
    evidence.write(evidence.of(TOKENS, LOGITS, rounded), tmp_path / "e.safetensors")
    kept = evidence.read(tmp_path / "e.safetensors")
    found = evidence.repeat(kept, other, FLOAT32)
    assert found.passed and found.activation_noise == pytest.approx(0.1, rel=0.1)
    assert not evidence.repeat(kept, other + 2 * (other - LOGITS), FLOAT32).passed


def test_what_is_no_evidence_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(ArtifactError, match="missing"):
        evidence.read(tmp_path / "e.safetensors")
    save_file({"tokens": TOKENS}, tmp_path / "e.safetensors")
    with pytest.raises(ArtifactError, match="columns"):
        evidence.read(tmp_path / "e.safetensors")
    kept = evidence.of(TOKENS, LOGITS, None)
    bad = {"tokens": -TOKENS - 1, "columns": kept.columns, "logits": kept.logits}
    save_file(bad, tmp_path / "e.safetensors")
    with pytest.raises(ArtifactError, match="tokens are not token ids"):
        evidence.read(tmp_path / "e.safetensors")
    with pytest.raises(ArtifactError, match="more"):
        evidence.repeat(kept, LOGITS[:, :100], FLOAT16)
