"""What a person sees in a terminal of 80 columns: nothing cut, errors with a way out."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from svdexport import cli
from svdexport.core.measures import GateResult
from svdexport.errors import SvdexportError
from svdexport.report import figures, html, table, terminal
from svdexport.report.items import Items
from tests.unit.report_example import example_result

SCRIPT = """\
#!{python}
from svdexport.cli import main
main()
"""
COMPLETE = """\
eval "$(svdexport --show-completion bash)"
words=("$@"); COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_svdexport_completion svdexport "${words[-1]}" "${words[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def shown(what: RenderableType, width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(what)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_figures_are_not_broken_in_two() -> None:
    items = Items("time", tuple(f"stage {i} 3 min {i:02d} s" for i in range(20)))
    lines = shown(items)
    assert all(len(line) <= 80 for line in lines) and all(line[:2] == "  " for line in lines[1:])
    assert all(re.fullmatch(r"(time: |  )(stage \d+ 3 min \d\d s(, |,?$))+", x) for x in lines)
    assert sum(line.count("stage") for line in lines) == 20


def test_the_results_table_names_every_runtime_whole() -> None:
    result = example_result()
    genai = tuple(
        dataclasses.replace(a, runtime="onnxruntime-genai") if a.format == "onnx" else a
        for a in result.artifacts
    )
    lines = shown(table.summary(dataclasses.replace(result, artifacts=genai)))
    assert max(map(len, lines)) <= 80
    assert "onnxruntime-genai" in "\n".join(lines) and "…" not in "\n".join(lines)


def test_large_perplexities_have_no_trailing_point() -> None:
    result = example_result()
    worse = tuple(
        dataclasses.replace(c, perplexity=228.3, plain_perplexity=160.9) for c in result.equal_bytes
    )
    (line, *_) = figures.equal_bytes(dataclasses.replace(result, equal_bytes=worse))
    assert "perplexity 228 against 161" in line


def test_the_rank_of_a_shared_factor_is_a_share_of_its_groups() -> None:
    """q, k and v with one A are one matrix of 960 rows: rank 256 is less than full for k too."""
    result = example_result()
    plan = tuple(
        dataclasses.replace(row, rank=256, group="model.layers.0.self_attn.q_proj")
        for row in result.plan
        if row.layer == 0 and row.name.endswith(("q_proj", "k_proj", "v_proj"))
    )
    heat = html.rank_heat(dataclasses.replace(result, plan=plan))
    assert heat is not None and heat.high == f"{256 / 576:.0%} of full rank"
    assert {cell.value for _, (cell, *_) in heat.lines if cell} == {1.0}


def test_an_inspection_shows_types_and_figures_as_words() -> None:
    rows = [
        {"layer": 0, "form": "dense", "rank": None, "types": {"weight": "Q8_0"}, "bytes": 1},
        {"layer": 1, "form": "pair", "rank": 8, "types": {"a": "Q8_0", "b": "Q8_0"}, "bytes": 2},
        {"layer": 1, "form": "pair", "rank": 8, "types": {"a": "Q8_0", "b": "F16"}, "bytes": 2},
    ]
    types = {"Q8_0": {"tensors": 2, "bytes": 3}}
    lines = shown(terminal.inspect_table({"linears": rows, "totals": {"bytes": 3, "types": types}}))
    assert not any("{" in line for line in lines)
    assert lines[:2] == ["totals: bytes 3", "types Q8_0: 2 tensors, 3 bytes"]
    assert "a Q8_0, b F16" in lines[-1] and lines[-2].split()[-2:] == ["Q8_0", "2"]


def test_verify_shows_a_speed_that_no_gate_is_for() -> None:
    ratio = {"median": 1.234, "low": 1.1, "high": 1.3}
    found = {
        "folder": "out/x",
        "gates": [dataclasses.asdict(GateResult("parity", 0.1, 0.02, True, "integrity", "m.gguf"))],
        "speed": {"m.gguf": {"prefill_speedup": ratio, "decode_speedup": None}},
        "verdict": {"word": "pass", "reasons": []},
    }
    (line,) = [x for x in shown(terminal.verify_table(found)) if "prefill" in x]
    assert line.split() == ["m.gguf", "prefill", "1.10–1.30", "no", "gate", "1.23x"]
    found["gates"] = [
        dataclasses.asdict(GateResult("min_prefill_speedup", 1, 1.1, True, "speed", "m.gguf"))
    ]
    assert "no gate" not in "\n".join(shown(terminal.verify_table(found)))


def test_the_list_of_commands_is_not_cut() -> None:
    said = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80"}).stdout
    assert "a second call resumes where" in said and "..." not in said.split("Commands:")[1]
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "code", "way_out"),
    [
        (["run", "none.yaml"], 2, "svdexport init"),
        (["run", "."], 2, "svdexport init"),
        (["plan", "r.yaml", "--set", "compress.budjet=1"], 2, "did you mean 'budget'?"),
        (["plan", "r.yaml", "--set", "compress.method=svd_lm"], 2, "did you mean 'svd_llm'?"),
        (["plan", "r.yaml", "--set", "compress"], 2, "write key=value"),
        (["plan", "r.yaml"], 3, "give a Hugging Face model folder"),
        (["run", "r.yaml", "--out", "full"], 2, "give another folder"),
        (["init", "full", "--for", "laptop"], 3, "config.json"),
        (["init", ".", "--for", "tablet"], 2, "laptop, phone, browser, server"),
        (["inspect", "published"], 3, "name one file or folder in it"),
        (["verify", "full"], 3, "svdexport run"),
        (["frontier", "r.yaml", "--budget", "5XB"], 2, "60MB"),
        (["frontier", "r.yaml", "--budget", "0"], 2, "60MB"),
        (["compare", "r.yaml", "--ratio", "2"], 2, "(0, 1]"),
        (["eval", "none.gguf", "--text", "r.yaml"], 3, "no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_call_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, way_out: str
) -> None:
    (tmp_path / "r.yaml").write_text(
        "schema: 1\nmodel: {path: nothing}\ncompress: {budget: {param_ratio: 0.8}}\n"
        "export: [{format: checkpoint}]\n"
    )
    for name, file in (("full", "mine.txt"), ("published", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    if words == ["init", ".", "--for", "tablet"]:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, words).exception
    assert isinstance(found, SvdexportError), found
    assert found.exit_code == code
    assert way_out in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "r.yaml"], "; the same command resumes"),
        (["run", "r.yaml", "--restart"], "; the same command without --restart resumes"),
        (["bench", "a.gguf"], ""),
    ],
)
def test_a_stopped_command_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["svdexport", *words])
    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == f"svdexport: stopped{said}\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["re"], {"report"}),
        (["run", "r.yaml", "--re"], {"--restart"}),
        (["init", "--for", ""], {"laptop", "phone", "browser", "server"}),
    ],
)
def test_bash_completes_commands_options_and_targets(
    tmp_path: Path, words: list[str], offered: set[str]
) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    script = tmp_path / "svdexport"
    script.write_text(SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [bash, "-c", COMPLETE, "bash", "svdexport", *words],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": root, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert set(done.stdout.split()) == offered, done.stderr
