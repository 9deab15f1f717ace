"""The pipeline's shell steps, run here on a real (tiny, random) model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.unit.tiny_checkpoints import make_model

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "tools" / "ci"
RECIPE = """
schema: 1
model: {path: model}
calibration: {source: file, file: text.txt, samples: 8, length: 32}
compress: {method: svd_llm, budget: {param_ratio: 0.6}, allocate: uniform, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 32, windows: 4}
"""


def run_step(folder: Path, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A shell step with GitHub's two files."""
    environment = os.environ | {
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "GITHUB_OUTPUT": str(folder / "outputs"),
        "OUT": str(folder / "release"),
        **extra,
    }
    command = ["bash", "-eo", "pipefail", "-c", script]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def outputs(folder: Path) -> dict[str, str]:
    lines = (folder / "outputs").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ci")
    make_model(folder / "model", "llama")
    text = " ".join(f"sentence number {i} of a text that repeats little" for i in range(200))
    (folder / "text.txt").write_text(text)
    (folder / "recipe.yaml").write_text(RECIPE)
    command = folder / "svdexport"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m svdexport "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "verdict"),
    [
        ("--quiet", 0, "pass"),
        ("--quiet\n--set\ngates.max_mean_kld=0.0000001", 4, "fail"),
        ("--quiet\n--set\ngates.max_bytes=1000", 5, "fail"),
        ("--set\nnonsense=1", 2, "error"),
    ],
)
def test_step_keeps_the_exit_code_and_shows_the_report(
    place: Path, args: str, code: int, verdict: str
) -> None:
    done = run_step(
        place,
        f'bash "{CI / "run.sh"}"',
        RECIPE="recipe.yaml",
        ARGS=args,
        SVDEXPORT=str(place / "svdexport"),
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == code, done.stderr[-2000:]
    found, summary = outputs(place), (place / "summary").read_text()
    assert (found["verdict"], found["exit-code"]) == (verdict, str(code))
    assert f"Exit code {code}. " in summary
    assert (place / "release").exists() == (code == 0)
    if verdict == "error":
        assert found["reports"] == "" and "svdexport: error" in summary
        return
    reports = place / found["reports"]
    assert {"manifest.json", "report.html", "summary.md"} <= {p.name for p in reports.iterdir()}
    assert f"release: {verdict}" in summary and "### Results" in summary


@pytest.mark.parametrize("code", [1, 3, 6, 7, 130])
def test_every_exit_code_is_explained(tmp_path: Path, code: int) -> None:
    """With a command that only ends with the code: `run.sh` alone is under test."""
    command = tmp_path / "svdexport"
    command.write_text(f"#!/bin/sh\nexit {code}\n")
    command.chmod(0o755)
    script = f'bash "{CI / "run.sh"}"'
    done = run_step(tmp_path, script, RECIPE="r.yaml", SVDEXPORT=str(command))
    assert done.returncode == code
    word = {3: "fail", 7: "inconclusive"}.get(code, "error")
    assert outputs(tmp_path)["verdict"] == word
    advice = re.search(rf"Exit code {code}\. (.+)", (tmp_path / "summary").read_text())
    assert advice is not None and len(advice[1]) > 20


def test_arguments_reach_the_command_as_they_are(tmp_path: Path) -> None:
    command = tmp_path / "svdexport"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > args.txt\n')
    command.chmod(0o755)
    tricky = "--set\na=b c\n$(touch evil)\n`touch evil`; touch evil"
    script = f'bash "{CI / "run.sh"}"'
    run_step(tmp_path, script, RECIPE="my recipe.yaml", ARGS=tricky, SVDEXPORT=str(command))
    lines = (tmp_path / "args.txt").read_text().splitlines()
    assert lines == [
        "run",
        "my recipe.yaml",
        "--out",
        str(tmp_path / "release"),
        *tricky.split("\n"),
    ]
    assert not (tmp_path / "evil").exists()


def test_missing_settings_are_named(tmp_path: Path) -> None:
    done = run_step(tmp_path, f'bash "{CI / "run.sh"}"')
    assert done.returncode != 0 and "set RECIPE" in done.stderr


def test_action_passes_inputs_by_environment_only() -> None:
    """An input put into a script by the expression language could run as code."""
    action = yaml.safe_load((CI / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    scripts = [step["run"] for step in action["runs"]["steps"] if "run" in step]
    assert len(scripts) == 3 and not any("${{" in script for script in scripts)
    for step in action["runs"]["steps"]:
        if "run" in step:
            assert step["shell"] == "bash"
    steps = {step.get("id") for step in action["runs"]["steps"]}
    used = re.findall(r"steps\.(\w+)\.outputs\.([\w-]+)", (CI / "action.yml").read_text())
    said = "\n".join([(CI / "run.sh").read_text(), *scripts])
    written = set(re.findall(r'echo "([\w-]+)=', said))
    assert used and all(step in steps and name in written for step, name in used)


def test_the_cache_of_the_action_is_for_this_runtime(tmp_path: Path) -> None:
    """Its key is that of the patches and pins: `hashFiles` would see the user's workspace only."""
    action = yaml.safe_load((CI / "action.yml").read_text())
    script = next(s["run"] for s in action["runs"]["steps"] if s.get("id") == "key")
    for name in ("constraints.txt", "pyproject.toml", "tools/llama_cpp"):
        here = tmp_path / "root" / name
        here.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, here)
    keys = []
    for patch in ("", "", "+ another line"):
        with (tmp_path / "root" / "tools/llama_cpp/low-rank.patch").open("a") as file:
            file.write(patch)
        (tmp_path / "outputs").unlink(missing_ok=True)
        assert run_step(tmp_path, script, ROOT=str(tmp_path / "root")).returncode == 0
        keys.append(outputs(tmp_path)["key"])
    assert keys[0] == keys[1] != keys[2] and re.fullmatch("[0-9a-f]{40}", keys[0])


def test_run_step_of_the_action_calls_the_script(tmp_path: Path) -> None:
    action = yaml.safe_load((CI / "action.yml").read_text())
    script = next(s["run"] for s in action["runs"]["steps"] if s.get("id") == "run")
    command = tmp_path / "svdexport" / "bin" / "svdexport"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\nexit 5\n")
    command.chmod(0o755)
    done = run_step(
        tmp_path, script, RECIPE="r.yaml", ROOT=str(ROOT), RUNNER_TEMP=str(tmp_path), ARGS=""
    )
    assert done.returncode == 5 and outputs(tmp_path)["verdict"] == "fail"


@pytest.mark.parametrize("name", ["example-workflow.yml", "gitlab-ci.yml", "action.yml"])
def test_pipeline_files_name_files_that_exist(name: str) -> None:
    text = (CI / name).read_text()
    assert yaml.safe_load(text)
    for path in re.findall(r"tools/[\w/.-]+\.sh", text):
        assert (ROOT / path).is_file()


def test_docs_explain_every_exit_code() -> None:
    text = (ROOT / "docs" / "verdict.md").read_text()
    assert [int(n) for n in re.findall(r"^\| (\d) \|", text, re.MULTILINE)] == list(range(8))
