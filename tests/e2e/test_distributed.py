"""Several processes under torchrun: the factors of one, the same bytes again, and deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from svdexport import api
from svdexport.models.blocks import InputGroup, Linear
from svdexport.pipeline.factors import shares
from tests.unit.tiny_checkpoints import make_model

RECIPE = """\
schema: 1
model: {path: m}
calibration: {source: file, file: text.txt, samples: 7, length: 24, batch: 2}
compress: {budget: {param_ratio: 0.7}, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 24, windows: 2}
speed: {threads: 2}
"""
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "m", "llama-tied")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def torchrun(place: Path, out: str, *more: str) -> subprocess.Popen[str]:
    # by address and interface: the machine's own name may take minutes to resolve, or not at all
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--local-addr", "127.0.0.1", "--nproc-per-node"]
    command = [*launcher, "2", "-m", "svdexport", "compress", "r.yaml", "--out", out, *more]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def factors(place: Path, out: str) -> list[Path]:
    return sorted((place / f".{out}.work" / "factors").glob("block_*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("compress.settings.labels=text",),
        ("compress.settings.labels=both",),
        ("compress.method=dobi_svd", "compress.settings.rows=100"),  # of three batches
    ],
)
def test_two_processes_give_the_factors_of_one(place: Path, how: tuple[str, ...]) -> None:
    outputs = []
    for out in ("two", "again"):
        process = torchrun(place, out, *(x for key in how for x in ("--set", key)))
        outputs.append(process.communicate(timeout=240))
        assert process.returncode == 0, outputs[-1][1]
    assert outputs[0][0].strip().endswith("checkpoint")
    api.compress(place / "r.yaml", place / "one", how)
    assert len(factors(place, "one")) == 2
    for one, two, again in zip(
        factors(place, "one"), factors(place, "two"), factors(place, "again"), strict=True
    ):
        assert two.read_bytes() == again.read_bytes()
        expected, found = load_file(one), load_file(two)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            error = torch.linalg.vector_norm(found[name] - tensor)
            assert error <= 1e-5 * torch.linalg.vector_norm(tensor), name
    checkpoints = [place / f".{out}.work" / "checkpoint" for out in ("two", "again")]
    for path in checkpoints[0].iterdir():
        assert path.read_bytes() == (checkpoints[1] / path.name).read_bytes()
    assert not list(place.rglob("activations*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_that_dies_stops_the_others_and_the_resume_works(place: Path, victim: str) -> None:
    make_model(place / "m", "llama-tied", num_hidden_layers=24)
    more = ["--set", "calibration.samples=64", "--set", "compress.method=svd_llm"]
    (place / "text.txt").write_text(TEXT * 4)
    process = torchrun(place, "two", *more)
    launcher = psutil.Process(process.pid)
    while len(factors(place, "two")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    (rank,) = [p for p in launcher.children() if p.environ().get("RANK") == victim]
    rank.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("svdexport: ")]
    assert "another process of this run has ended" in line
    assert "same command again" in line
    kept = {path: path.stat().st_mtime_ns for path in factors(place, "two")}
    assert 2 <= len(kept) < 24
    process = torchrun(place, "two", *more)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"{len(kept)} of 24 blocks are done already" in err
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(factors(place, "two")) == 24


@pytest.mark.slow
def test_a_wrong_recipe_is_said_once(place: Path) -> None:
    process = torchrun(place, "two", "--set", "compress.method=svd_lm")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len([line for line in err.splitlines() if line.startswith("svdexport: ")]) == 1
    assert "svd_llm" in err


def test_groups_are_shared_out_by_cost() -> None:
    sizes = [(192, 64), (64, 64), (256, 64), (64, 128)]
    groups = [
        [(0, InputGroup(0, (Linear(f"l{i}", rows, columns, False),)))]
        for i, (rows, columns) in enumerate(sizes)
    ]
    parts = [[alike[0][1].leader for alike in part] for part in shares(groups, 2)]
    assert parts == [["l2", "l1"], ["l0", "l3"]]
    assert shares(groups, 1)[0] != [] and len(shares(groups, 9)) == 9
