"""The report as Markdown: for a pipeline's summary page, and as a part of the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from svdexport.files import write_atomic
from svdexport.report import figures
from svdexport.report.result import RunResult

NAME = "summary.md"

_MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}


def write(result: RunResult, folder: Path) -> Path:
    """Write the summary into `folder`."""
    write_atomic(folder / NAME, summary(result))
    return folder / NAME


def summary(result: RunResult) -> str:
    """Verdict, gates, results, what was kept dense, time per stage."""
    parts = [
        f"## {_MARKS[result.verdict.word]} {escape(result.name)}: {result.verdict.word}",
        figures.headline(result),
    ]
    if result.verdict.reasons:
        parts.append("\n".join(f"- {escape(reason)}" for reason in result.verdict.reasons))
    if result.gates:
        parts += ["### Gates", gates(result)]
    parts += ["### Results", results(result)]
    if lines := figures.equal_bytes(result):
        parts.append("At equal bytes:\n\n" + "\n".join(f"- {escape(line)}" for line in lines))
    dense = figures.kept_dense(result)
    if dense:
        parts += ["### Kept dense", kept_dense(result)]
    if result.stages:
        parts += ["### Time", stages(result)]
    parts.append(f"Repeat with {code(result.command)}.")
    return "\n\n".join(parts) + "\n"


def results(result: RunResult) -> str:
    """The table of artifacts."""
    head = (
        "artifact", "role", "runtime", "MB", "perplexity", "mean KLD", "same top token",
        "prefill tokens/s", "speedup", "decode tokens/s", "speedup",
    )  # fmt: skip
    lines = [
        (
            row.artifact,
            row.role,
            row.runtime,
            row.size,
            f"{row.perplexity} {row.perplexity_error}".strip(),
            row.mean_kld,
            row.same_top,
            row.prefill_tps,
            _with_interval(row.prefill_speedup, row.prefill_interval),
            row.decode_tps,
            _with_interval(row.decode_speedup, row.decode_interval),
        )
        for row in figures.rows(result)
    ]
    return table(head, lines, left=3)


def gates(result: RunResult) -> str:
    """A line for each gate; values are the pessimistic ends of their intervals."""
    lines = []
    for gate in result.gates:
        limit, value = figures.gate_values(gate)
        lines.append((gate.artifact, gate.name, limit, value, figures.gate_word(gate)))
    return table(("artifact", "gate", "limit", "value", "result"), lines, left=2)


def kept_dense(result: RunResult) -> str:
    """What stayed dense, by reason."""
    lines = [
        (group.reason, names(group.names), str(len(group.names)), f"{group.params:,}")
        for group in figures.kept_dense(result)
    ]
    return table(("reason", "which", "linears", "parameters"), lines, left=2)


def names(every: Sequence[str], most: int = 4) -> str:
    """The first few of many names."""
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {more} more" if more > 0 else "")


def stages(result: RunResult) -> str:
    """Time per stage."""
    lines = [
        (stage.name, "from an earlier run" if stage.resumed else figures.seconds(stage.seconds))
        for stage in result.stages
    ]
    return table(("stage", "time"), lines, left=1)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are aligned left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    every = [head, rule, *([escape(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def escape(text: str) -> str:
    """Text that stays text in Markdown: no markup, no HTML, no line breaks."""
    text = " ".join(text.split())
    for char in "\\|`*_[]<>":
        text = text.replace(char, "\\" + char)
    return text.replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(text: str) -> str:
    """Inline code on one line, in more backticks than the text has in a row."""
    text = " ".join(text.split())
    ticks = "`"
    while ticks in text:
        ticks += "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _with_interval(median: str, interval: str) -> str:
    return f"{median} ({interval})" if interval else median
