"""The comparison of methods as JSON, as a Markdown table and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from svdexport.files import write_atomic
from svdexport.report.svg import Scale


@dataclass(frozen=True)
class Figure:
    """Perplexity at a wanted kept ratio; ``kept`` is the ratio that the ranks came to."""

    ratio: float
    kept: float
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class Entry:
    """One contender's figures, one for each ratio."""

    label: str
    source: str
    method: str
    settings: dict[str, Any]
    allocate: str
    allocation: dict[str, Any]
    group: bool
    figures: tuple[Figure, ...]
    sequential: bool = False


@dataclass(frozen=True)
class Comparison:
    """All figures, taken on the same tokens; perplexities by torch in float32.

    Attributes:
        identity: hash of what all entries share: the model, the tokens, the recipe's own keys.
    """

    identity: str
    model: str
    dense: float
    ratios: tuple[float, ...]
    calibration_tokens: int
    evaluation_tokens: int
    machine: dict[str, Any]
    entries: tuple[Entry, ...]


def write(found: Comparison, folder: Path) -> None:
    """``compare.json``, ``compare.md`` and ``compare.svg``."""
    write_atomic(folder / "compare.json", json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    write_atomic(folder / "compare.md", table(found))
    write_atomic(folder / "compare.svg", picture(found))


def earlier(folder: Path, identity: str) -> tuple[Entry, ...]:
    """Entries of a comparison of the same things that the folder holds; none without one."""
    file = folder / "compare.json"
    if not file.exists():
        return ()
    data = json.loads(file.read_text(encoding="utf-8"))
    if data.get("identity") != identity:
        return ()
    return tuple(
        Entry(**entry | {"figures": tuple(Figure(**figure) for figure in entry["figures"])})
        for entry in data["entries"]
    )


def table(found: Comparison) -> str:
    """A row a contender, a column a ratio."""
    heads = [f"{1 - ratio:.0%} removed (kept)" for ratio in found.ratios]
    lines = [
        f"Perplexity of {found.model} (dense {found.dense:.2f}) on {found.evaluation_tokens:,} "
        f"tokens; calibrated on {found.calibration_tokens:,}.",
        "",
        "| method | allocation | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(heads),
    ]
    for entry in found.entries:
        cells = [f"{number(f.perplexity)} ({f.kept:.3f})" for f in entry.figures]
        lines.append(f"| {entry.label} | {entry.allocate} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number(perplexity: float) -> str:
    """Four digits that matter; a large one without decimals."""
    if not math.isfinite(perplexity):
        return str(perplexity)
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.4g}"


ROW, LEFT, WIDTH, TOP = 24, 150, 640, 46
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's


def picture(found: Comparison) -> str:
    """An SVG of its own: a row a contender, a dot a ratio, on a logarithmic axis."""
    values = [f.perplexity for e in found.entries for f in e.figures]
    finite = [value for value in (*values, found.dense) if math.isfinite(value)]
    x = Scale(min(finite) / 1.15, max(finite) * 1.15, LEFT, WIDTH - 20, log=True)
    bottom = TOP + ROW * len(found.entries)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>Perplexity by method, {escape(found.model)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + 40}" fill="white"/>',
    ]
    for i, ratio in enumerate(found.ratios):
        left, colour = LEFT + 110 * i, COLOURS[i % len(COLOURS)]
        parts.append(f'<circle cx="{left}" cy="16" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 9}" y="20">{1 - ratio:.0%} removed</text>')
    for tick in _ticks(x):
        at = x.at(tick)
        parts.append(_line(at, TOP - 8, at, bottom, "#ddd"))
        place = f'x="{at:.1f}" y="{bottom + 16}" text-anchor="middle"'
        parts.append(f"<text {place}>{_tick(tick)}</text>")
    at = x.at(found.dense)
    parts.append(_line(at, TOP - 8, at, bottom, "#555"))
    parts.append(f'<text x="{at:.1f}" y="{TOP - 12}" text-anchor="middle">dense</text>')
    for row, entry in enumerate(found.entries):
        y = TOP + ROW * (row + 0.5)
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(entry.label)}</text>'
        )
        for i, figure in enumerate(entry.figures):
            if math.isfinite(figure.perplexity):
                colour, cx = COLOURS[i % len(COLOURS)], x.at(figure.perplexity)
                parts.append(f'<circle cx="{cx:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
    parts.append(
        f'<text x="{WIDTH - 20}" y="{bottom + 34}" text-anchor="end">perplexity, log scale</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(x: Scale) -> list[int]:
    """1, 2 and 5 times powers of ten within the axis; powers of ten alone where those are many."""
    powers = range(math.floor(math.log10(x.low)), math.ceil(math.log10(x.high)) + 1)
    all_ticks = [m * 10**p for p in powers if p >= 0 for m in (1, 2, 5)]
    within = [tick for tick in all_ticks if x.low <= tick <= x.high]
    tens = [tick for tick in within if str(tick).strip("0") == "1"]
    return tens if len(within) > 9 and tens else within


def _tick(value: int) -> str:
    """A tick's label; long numbers, which would run into each other, as powers: 2e6."""
    if value < 100_000:
        return f"{value:,}"
    power = math.floor(math.log10(value))
    return f"{value // 10**power}e{power}"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
