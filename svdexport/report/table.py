"""The table at the end of a run, for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svdexport.report import figures
from svdexport.report.items import Items
from svdexport.report.result import RunResult

_STYLES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
_WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE"}


def summary(result: RunResult) -> RenderableType:
    """Table, gates that did not pass, time per stage, verdict."""
    parts: list[RenderableType] = [results_table(result)]
    if lines := figures.equal_bytes(result):
        parts.append(Text("\n".join(["at equal bytes:", *lines, ""]), style="dim"))
    if result.stages:
        parts.append(_stages(result))
    parts.append(verdict(result))
    return Group(*parts)


def results_table(result: RunResult) -> Table:
    """A row for each artifact; a speedup's 95 % interval and perplexity's error stand below it."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("artifact", ratio=1)
    for name in ("MB", "perplexity", "KLD", "prefill t/s", "speedup", "decode t/s", "speedup"):
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    last = "0"
    for row in figures.rows(result):
        if row.group != last:
            table.add_section()
        last = row.group
        table.add_row(
            _two(row.artifact, f"{row.role}, {row.runtime}"),
            row.size,
            _two(row.perplexity, row.perplexity_error),
            row.mean_kld,
            row.prefill_tps,
            _two(row.prefill_speedup, row.prefill_interval),
            row.decode_tps,
            _two(row.decode_speedup, row.decode_interval),
        )
    return table


def verdict(result: RunResult) -> Text:
    """The verdict, with a line for each reason."""
    text = Text()
    text.append(_WORDS[result.verdict.word], style=_STYLES[result.verdict.word])
    text.append(f"  {figures.headline(result)}")
    for reason in result.verdict.reasons:
        text.append(f"\n  - {reason}")
    return text


def _two(first: str, second: str) -> Text:
    text = Text(first)
    if second:
        text.append(f"\n{second}", style="dim")
    return text


def _stages(result: RunResult) -> Group:
    parts = [
        f"{stage.name} {'(from before)' if stage.resumed else figures.seconds(stage.seconds)}"
        for stage in result.stages
    ]
    total = figures.seconds(sum(stage.seconds for stage in result.stages))
    return Group(Items("time", (*parts, f"in all {total}"), "dim"), Text(""))
