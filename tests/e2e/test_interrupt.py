"""Ctrl-C: the run stops, says that the same command resumes, and it does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.gguf_models import make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 64, length: 64, batch: 1}
compress: {method: kfac_svd, budget: {param_ratio: 0.7}}
export: [{format: checkpoint}]
evaluate: {context: 32, windows: 2}
speed: {threads: 1}
"""


# As in a terminal: what runs the tests in the background may have SIGINT ignored.
MAIN = """\
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from svdexport.cli import main
main()
"""


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_resumes(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=256, intermediate_size=512)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", MAIN, "run", str(tmp_path / "recipe.yaml")]
    command += ["--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith("  ") and "factors\n" in said:  # some progress in this stage
                run.send_signal(signal.SIGINT)
                break
        said += run.stderr.readlines()
        assert run.wait(timeout=120) == 130
    assert said[-1] == "svdexport: stopped; the same command resumes\n"
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.work" / "stages" / "text.json").exists()
    again = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=600, check=True
    )
    assert "text (done before)" in again.stderr
    assert json.loads(again.stdout)["verdict"]["word"] == "pass"
    quiet = subprocess.run(
        [*command, "--quiet", "--json"], capture_output=True, text=True, timeout=600, check=True
    )
    assert quiet.stderr == ""
