"""The benchmark that measures what a refiner gains, on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiny_checkpoints import make_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_prints_perplexities_before_and_after(tmp_path: Path) -> None:
    make_model(tmp_path / "m", "llama", max_position_embeddings=2048)
    lines = [f"line {i} of a text with {i * i} in it" for i in range(400)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    command = [sys.executable, "tools/benchmarks/quality.py", "--text", tmp_path / "t.txt"]
    command += ["--model", tmp_path / "m", "--work", tmp_path / "work", "--kept", "0.6"]
    command += ["--rank-multiple", "8", "--samples", "16", "--length", "32", "--windows", "2"]
    command += ["--refine", "sequential_ls", "--refine", "distill", "--steps", "40"]
    command += ["--threads", "1", "--set", "refine.1.patience=100"]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = ("perplexity_dense", "perplexity_compressed", "perplexity_refined")
    assert all(1 < found[name] < math.inf for name in names)
    assert len({found[name] for name in names}) == 3
    assert found["notes"][0].startswith("sequential_ls: squared error")
    assert found["notes"][1].startswith("distill: 40 steps, 5120 tokens")
    assert {"refine sequential_ls", "refine distill", "all"} <= set(found["seconds"])
