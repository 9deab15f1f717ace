"""`report.html`: one file without network or script, light and dark, for a screen of any width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdexport.errors import MissingExtraError
from svdexport.files import write_atomic
from svdexport.report import figures, svg
from svdexport.report.result import ArtifactResult, PlanRow, RunResult

NAME = "report.html"
FAMILIES = ("gguf", "onnx", "checkpoint")


@dataclass(frozen=True)
class Cell:
    """A linear in a heat map: `value` in 0..1 chooses the colour, None is a dense layer."""

    text: str
    title: str
    value: float | None


@dataclass(frozen=True)
class Heat:
    """A heat map: a line for each kind of linear, a cell for each layer (None: no such linear)."""

    layers: int
    lines: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    low: str
    high: str


@dataclass(frozen=True)
class StageBar:
    """A stage with its share of the longest one, in percent."""

    name: str
    text: str
    share: float


def write(result: RunResult, folder: Path) -> Path:
    """Write the report into `folder`. Raises MissingExtraError without jinja2."""
    write_atomic(folder / NAME, render(result))
    return folder / NAME


def render(result: RunResult) -> str:
    """The whole page."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingExtraError("report", "writing report.html") from None
    environment = Environment(
        loader=PackageLoader("svdexport", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**context(result))


def context(result: RunResult) -> dict[str, Any]:
    """What the template shows."""
    return {
        "r": result,
        "f": figures,
        "headline": figures.headline(result),
        "rows": figures.rows(result),
        "equal_bytes": figures.equal_bytes(result),
        "tiles": [a for a in result.artifacts if a.kept],
        "kept_ratio": figures.kept_ratio(result),
        "pairs": len(figures.factorised(result)),
        "charts": charts(result),
        "speedups": speedups(result),
        "speed_gated": any(gate.kind == "speed" for gate in result.gates),
        "ranks": rank_heat(result),
        "errors": error_heat(result),
        "kept_dense": figures.kept_dense(result),
        "stages": stage_bars(result),
        "total_time": figures.seconds(sum(s.seconds for s in result.stages)),
        "samples": [
            (a, g) for a in result.artifacts if a.kept and a.quality for g in a.quality.generations
        ],
        "families": [f for f in FAMILIES if any(a.format == f for a in result.artifacts)],
        "roles": list(dict.fromkeys(a.role for a in result.artifacts)),
    }


def charts(result: RunResult) -> list[tuple[str, str]]:
    """Title and picture: size, prefill and decode speed against perplexity."""
    measured = [a for a in result.artifacts if a.quality is not None]
    fast = [a for a in measured if a.speed is not None]

    def chart(found: Iterable[ArtifactResult], kind: str, axis: str) -> str:
        points = [_point(a, kind) for a in found]
        return svg.scatter(points, axis, "perplexity", f"{axis} against perplexity")

    every = [
        ("Size against quality", chart(measured, "size", "MB")),
        ("Prefill speed against quality", chart(fast, "prefill", "prefill tokens/s")),
        ("Decode speed against quality", chart(fast, "decode", "decode tokens/s")),
    ]
    return [(title, picture) for title, picture in every if picture]


def _point(artifact: ArtifactResult, kind: str) -> svg.Point:
    assert artifact.quality is not None
    if kind == "size":
        x = artifact.bytes / 1e6
    else:
        assert artifact.speed is not None
        x = artifact.speed.prefill_tps if kind == "prefill" else artifact.speed.decode_tps
    label = artifact.type if artifact.role == "compressed" else f"{artifact.type} {artifact.role}"
    pair = f"{artifact.format} {artifact.type}"
    return svg.Point(x, artifact.quality.perplexity, label, artifact.format, artifact.role, pair)


def speedups(result: RunResult) -> list[tuple[str, str]]:
    """Title and picture of each artifact's speedups, all with the same scale."""
    every = [(a, _bars(result, a)) for a in result.artifacts]
    bars = [bar for _, found in every for bar in found]
    low, high = svg.range_of(bars)
    return [
        (f"{a.label}, {a.role}" if a.role != "compressed" else a.label, picture)
        for a, found in every
        if (picture := svg.intervals(found, low, high, f"Speedup of {a.label}"))
    ]


def _bars(result: RunResult, artifact: ArtifactResult) -> list[svg.Bar]:
    if artifact.speed is None:
        return []
    baseline = result.baseline_of(artifact)
    others = {}
    if baseline is not None and baseline.speed is not None:
        others = {t.metric: t for t in baseline.speed.timings}
    bars = []
    for timing in artifact.speed.timings:
        if timing.speedup is None:
            continue
        base = others.get(timing.metric)
        ratios: tuple[float, ...] = ()
        # the baseline may have been timed again beside another artifact: then its rounds are others
        if base is not None and len(base.samples) == len(timing.samples):
            every = zip(base.samples, timing.samples, strict=True)
            ratios = tuple(b.seconds / s.seconds for b, s in every if not s.disturbed)
        limit = _limit(result, artifact, timing.metric)
        name = timing.metric.replace("_", " ")
        bars.append(svg.Bar(name, artifact.format, timing.speedup, ratios, limit))
    return bars


def _limit(result: RunResult, artifact: ArtifactResult, metric: str) -> float | None:
    name = f"min_{metric.partition('_')[0]}_speedup"
    for gate in result.gates:
        if gate.name == name and gate.artifact == artifact.path:
            return gate.limit
    return None


def _kind(row: PlanRow) -> str:
    return row.name.rpartition(".")[2]


def _heat(result: RunResult, cells: dict[tuple[str, int], Cell], low: str, high: str) -> Heat:
    rows = [row for row in result.plan if row.layer is not None]
    layers = 1 + max((row.layer or 0 for row in rows), default=-1)
    kinds = dict.fromkeys(_kind(row) for row in rows)
    lines = tuple((kind, tuple(cells.get((kind, i)) for i in range(layers))) for kind in kinds)
    return Heat(layers, lines, low, high)


def rank_heat(result: RunResult) -> Heat | None:
    """Rank of each linear; colour by its share of the full rank. None without decoder blocks.

    The full rank is that of the whole group: linears that share an A are one stacked matrix.
    """
    rows: dict[str, int] = {}  # of a group's stacked matrix
    for row in result.plan:
        rows[row.group or row.name] = rows.get(row.group or row.name, 0) + row.shape[0]
    cells: dict[tuple[str, int], Cell] = {}
    shares: list[float] = []
    for row in result.plan:
        if row.layer is None:
            continue
        where = f"layer {row.layer}, {row.name}"
        if row.rank is None:
            cell = Cell("", f"{where}: dense ({row.reason})", None)
        else:
            full = min(rows[row.group or row.name], row.shape[1])
            shares.append(row.rank / full)
            cell = Cell(str(row.rank), f"{where}: rank {row.rank} of {full}", row.rank / full)
        cells[_kind(row), row.layer] = cell
    if not shares:
        return None
    top = max(shares)
    scaled = {
        key: Cell(c.text, c.title, None if c.value is None else c.value / top)
        for key, c in cells.items()
    }
    return _heat(result, scaled, "0", f"{top:.0%} of full rank")


def error_heat(result: RunResult) -> Heat | None:
    """Relative output error of each linear. None where no linear has one."""
    errors = [r.relative_error for r in result.plan if r.relative_error is not None]
    if not errors:
        return None
    top = max(errors) or 1.0
    cells: dict[tuple[str, int], Cell] = {}
    for row in result.plan:
        if row.layer is None:
            continue
        where = f"layer {row.layer}, {row.name}"
        if row.relative_error is None or row.rank is None:
            cell = Cell("", f"{where}: dense ({row.reason})", None)
        else:
            text = f"{row.relative_error:.2f}".lstrip("0")
            cell = Cell(text, f"{where}: {row.relative_error:.3f}", row.relative_error / top)
        cells[_kind(row), row.layer] = cell
    return _heat(result, cells, "0", f"{top:.2f}")


def stage_bars(result: RunResult) -> list[StageBar]:
    """Stages with their time; the longest has a share of 100."""
    longest = max((s.seconds for s in result.stages), default=0.0) or 1.0
    return [
        StageBar(
            s.name,
            "from an earlier run" if s.resumed else figures.seconds(s.seconds),
            0.0 if s.resumed else 100 * s.seconds / longest,
        )
        for s in result.stages
    ]
