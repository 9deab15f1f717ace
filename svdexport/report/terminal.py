"""Tables of the smaller commands, for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svdexport.core.measures import GateResult, Speedup
from svdexport.report.figures import gate_values, gate_word, interval, seconds, times
from svdexport.report.items import Items

MEGA = 1e6


def _table(*columns: tuple[str, bool]) -> Table:
    """A plain table; a column is (title, whether it holds numbers)."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title, number in columns:
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    return table


def plan_table(found: dict[str, Any]) -> RenderableType:
    """One row a group of linears, then the totals."""
    table = _table(
        ("block", True), ("linears", False), ("shape", True), ("rank", True), ("kept", True)
    )
    for row in found["groups"]:
        roles = [name.rpartition(".")[2] for name in row["linears"]]
        same = len(roles) > 1 and len(set(roles)) == 1  # those of a layer's experts
        names = f"{len(roles)} x {roles[0]}" if same else " ".join(roles)
        rank = "dense" if row["rank"] is None else str(row["rank"])
        kept = f"{row['params'] / row['params_dense']:.1%}"
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        table.add_row(str(row["block"]), names, shape, rank, kept)
    memory = found["memory_bytes"]
    lines = [
        f"{found['model']}:",
        f"method {found['method']}, {found['ranks']} ranks",
        f"kept {found['kept']:.1%} of {found['params_dense']:,} parameters "
        f"({1 - found['kept']:.1%} removed)",
        *(
            [f"predicted: a token {found['predicted_speedup']:.2f} times as fast, by its products"]
            if found.get("predicted_speedup")
            else []
        ),
    ]
    kinds = (f"{name.replace('_', ' ')} {size / MEGA:,.0f} MB" for name, size in memory.items())
    stages = (f"{stage} {seconds(value)}" for stage, value in found["seconds"].items())
    costs = Group(Items("memory", tuple(kinds)), Items("time here, roughly", tuple(stages)))
    sizes = _table(
        ("file", False), ("bytes", True), ("dense twin", True), ("what is counted", False)
    )
    for item in found["exports"]:
        kind = "weight_bytes" if item["file_bytes"] is None else "file_bytes"
        sizes.add_row(item["name"], f"{item[kind]:,}", f"{item[f'dense_{kind}']:,}", item["note"])
    others = [
        Text(f"{item['name']}: {line}") for item in found["exports"] for line in item["other_types"]
    ]
    return Group(table, Text("\n".join(lines)), costs, sizes, *others)


def eval_table(found: dict[str, Any]) -> RenderableType:
    """Figures with their errors."""
    table = _table(("figure", False), ("value", True), ("error", True))
    spreads = found.get("spreads") or {}
    for name in ("perplexity", "mean_kld", "kld_p999", "same_top", "perplexity_ratio"):
        value = found.get(name)
        if value is not None:
            spread = spreads.get(name)
            table.add_row(name, f"{value:.5g}", f"{spread['stderr']:.2g}" if spread else "")
    head = (
        f"{found['artifact']} on {found['runtime']}: {found['windows']} windows of "
        f"{found['context']} tokens"
    )
    return Group(Text(head), table)


def bench_table(found: dict[str, Any]) -> RenderableType:
    """Tokens per second, speedup with its 95 % interval, verdict."""
    table = _table(
        ("artifact", False), ("MB", True), ("metric", False), ("t/s", True), ("speedup", True)
    )
    for artifact in found["artifacts"]:
        for timing in artifact["timings"]:
            speedup = timing["speedup"]
            shown = "baseline"
            if speedup:
                shown = f"{speedup['median']:.3f} ({speedup['low']:.3f}-{speedup['high']:.3f})"
            table.add_row(
                artifact["path"],
                f"{artifact['bytes'] / MEGA:.1f}",
                timing["metric"],
                f"{timing['tps']:.1f}",
                shown,
            )
    notes = "".join(f"\n{note}" for note in found["notes"])
    return Group(table, Text(f"verdict: {found['verdict']}{notes}"))


def verify_table(found: dict[str, Any]) -> RenderableType:
    """What `verify` repeated, gate by gate, after the hashes were found right."""
    head = Text(f"{found['folder']}: files and tensors are what the manifest says")
    if "gates" not in found:
        return head
    table = _table(
        ("artifact", False), ("checked again", False), ("limit", True), ("here", True), ("", False)
    )
    gates = [GateResult(**gate) for gate in found["gates"]]
    for gate in gates:
        limit, value = gate_values(gate)
        table.add_row(gate.artifact, gate.name, limit, value, gate_word(gate))
    gated = {gate.name for gate in gates}
    for path, speed in found["speed"].items():
        for kind in ("prefill", "decode"):
            speedup = speed[f"{kind}_speedup"]
            if speedup is not None and f"min_{kind}_speedup" not in gated:
                ratio = Speedup(**speedup)
                table.add_row(path, f"{kind} {interval(ratio)}", "no gate", times(ratio), "")
    verdict = found["verdict"]
    reasons = "".join(f"\n  - {reason}" for reason in verdict["reasons"])
    return Group(head, table, Text(f"verdict: {verdict['word']}{reasons}"))


def inspect_table(found: dict[str, Any]) -> RenderableType:
    """One row a linear; further keys of the inspection above it."""
    rows = found.get("linears") or found.get("layers") or []
    head: list[RenderableType] = [
        Text(f"{key}: {value}")
        for key, value in found.items()
        if not isinstance(value, list | dict)
    ]
    head += [_items(key, value) for key, value in found.items() if isinstance(value, dict)]
    if not rows:
        return Group(*head)
    columns = [key for key in rows[0] if key not in {"shape"}]
    numbers = {name for name in columns for row in rows if isinstance(row.get(name), int | float)}
    table = _table(*((name, name in numbers) for name in columns))
    for row in rows:
        table.add_row(*(_short(row.get(name)) for name in columns))
    return Group(*head, table)


def _items(head: str, values: dict[str, Any]) -> RenderableType:
    """Figures with their names; a figure that has parts of its own stands on a line of its own."""
    parts = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = tuple(f"{name} {_short(v)}" for name, v in values.items() if name not in parts)
    lines = [
        Items(f"{name} {kind}", tuple(f"{_short(v)} {k}" for k, v in figures.items()))
        for name, inner in parts.items()
        for kind, figures in inner.items()
    ]
    return Group(Items(head, plain), *lines)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    if isinstance(value, dict):  # the types of a pair's factors
        if len(set(value.values())) == 1:
            return str(next(iter(value.values())))
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def methods_table(rows: list[dict[str, str]]) -> RenderableType:
    """Methods with their sources."""
    table = _table(("name", False), ("what it is", False), ("needs", False), ("source", False))
    for row in rows:
        table.add_row(row["name"], row["title"], row["needs"] or "–", row["source"])
    return table


def doctor_table(found: dict[str, Any]) -> RenderableType:
    """Parts, versions and advice."""
    table = _table(("part", False), ("for", False), ("there", False), ("how to get it", False))
    for part in found["parts"]:
        there = "yes" if part["installed"] else "no"
        table.add_row(part["part"], part["for"], there, part["advice"])
    llama = found["llama_cpp"]
    pairs = "knows low-rank pairs" if llama["low_rank"] else "does not know low-rank pairs"
    lines = [f"llama.cpp here {pairs}."]
    if llama["advice"]:
        lines.append(llama["advice"])
    versions = Items("versions", tuple(f"{k} {v}" for k, v in found["versions"].items()))
    return Group(table, Text("\n".join(lines)), versions)
