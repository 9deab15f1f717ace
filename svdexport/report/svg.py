"""Charts as inline SVG, drawn for a width of 360 so that a phone shows their text at full size.

Colours come from classes and custom properties of the page's style sheet, for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from svdexport.core.measures import Speedup

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 14, 36


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart. `family` and `role` choose colour and shape; points of one
    `pair` are joined, from the dense one to the other."""

    x: float
    y: float
    label: str
    family: str
    role: str
    pair: str


@dataclass(frozen=True)
class Bar:
    """A speedup with its interval, the rounds behind it, and the gate's limit where one is set."""

    label: str
    family: str
    speedup: Speedup
    ratios: tuple[float, ...]
    limit: float | None


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = math.log(low), math.log(high), math.log(value)
        return self.start + (v - low) / (high - low) * (self.end - self.start)


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that gives about `count` ticks."""
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values within [low, high]."""
    step = nice_step(high - low, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range with some room around the values."""
    low, high = min(values), max(values)
    room = 0.14 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> str:
    """Points with their labels; a log scale for y where it spans more than a factor of five."""
    if not points:
        return ""
    height = 270
    ys = [p.y for p in points]
    log = min(ys) > 0 and max(ys) > 5 * min(ys)
    y_low, y_high = (min(ys) / 1.2, max(ys) * 1.2) if log else limits(ys)
    x_low, x_high = limits([p.x for p in points])
    x = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y = Scale(y_low, y_high, height - BOTTOM, TOP, log)
    parts = [_grid(x, y, height)]
    parts += [_joined(a, b, x, y) for a, b in _twins(points)]
    parts += [_marker(p, x, y) for p in points]
    parts += _labels(points, x, y)
    parts.append(_text(WIDTH - RIGHT, height - 4, x_title, "end", "axis"))
    parts.append(_text(4, TOP - 3, y_title, "start", "axis"))
    return _svg(height, title, parts)


def range_of(bars: Sequence[Bar]) -> tuple[float, float]:
    """A range that holds all bars, their rounds and gates, and 1.0."""
    values = [1.0] + [v for b in bars for v in (b.speedup.low, b.speedup.high, *b.ratios)]
    return limits(values + [b.limit for b in bars if b.limit is not None])


def intervals(bars: Sequence[Bar], low: float, high: float, title: str) -> str:
    """Speedups as dots with whiskers over their rounds; a line marks 1.0, a tick the gate."""
    if not bars:
        return ""
    row = 40
    height = TOP + row * len(bars) + BOTTOM - 8
    x = Scale(low, high, 12, WIDTH - 12)
    bottom = height - 24
    parts = []
    for value in ticks(low, high, 5):
        parts.append(_line(x.at(value), TOP, x.at(value), bottom, "grid"))
        parts.append(_text(x.at(value), bottom + 14, f"{value:g}x", "middle", "tick"))
    parts.append(_line(x.at(1.0), TOP - 6, x.at(1.0), bottom, "one"))
    for index, bar in enumerate(bars):
        parts += _bar(bar, x, TOP + row * index + 27)
    return _svg(height, title, parts)


def _bar(bar: Bar, x: Scale, y: float) -> list[str]:
    s = bar.speedup
    figure = f"{s.median:.2f}x ({s.low:.2f}\u2013{s.high:.2f})"
    parts = [
        _text(12, y - 12, bar.label, "start", "name"),
        _text(WIDTH - 12, y - 12, figure, "end", "value"),
    ]
    parts += [
        f'<circle class="round {bar.family}" cx="{x.at(r):.1f}" cy="{y:.1f}" r="2.5"/>'
        for r in bar.ratios
    ]
    parts.append(_line(x.at(s.low), y, x.at(s.high), y, f"whisker {bar.family}"))
    parts.append(
        f'<circle class="fill {bar.family}" cx="{x.at(s.median):.1f}" cy="{y:.1f}" r="4.5"/>'
    )
    if bar.limit is not None:
        at = x.at(bar.limit)
        parts.append(_line(at, y - 7, at, y + 7, "limit"))
    return parts


def _grid(x: Scale, y: Scale, height: float) -> str:
    parts = []
    for value in ticks(x.low, x.high):
        at = x.at(value)
        parts.append(_line(at, TOP, at, height - BOTTOM, "grid"))
        parts.append(_text(at, height - BOTTOM + 14, f"{value:g}", "middle", "tick"))
    for value in _log_ticks(y) if y.log else ticks(y.low, y.high):
        at = y.at(value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(_text(LEFT - 5, at + 4, f"{value:g}", "end", "tick"))
    return "".join(parts)


def _log_ticks(scale: Scale) -> list[float]:
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return [v for v in every if scale.low <= v <= scale.high]


def _twins(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    dense = {p.pair: p for p in points if p.role == "dense"}
    others = [p for p in points if p.role == "compressed" and p.pair in dense]
    return [(dense[p.pair], p) for p in others]


def _joined(a: Point, b: Point, x: Scale, y: Scale) -> str:
    return _line(x.at(a.x), y.at(a.y), x.at(b.x), y.at(b.y), f"joined {b.family}")


def _marker(point: Point, x: Scale, y: Scale) -> str:
    px, py = x.at(point.x), y.at(point.y)
    if point.role == "plain":
        shape = f"M{px:.1f} {py - 6:.1f}l6 6l-6 6l-6 -6z"
        return f'<path class="open {point.family}" d="{shape}"/>'
    kind = "open" if point.role == "dense" else "fill"
    return f'<circle class="{kind} {point.family}" cx="{px:.1f}" cy="{py:.1f}" r="5"/>'


def _labels(points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """Labels beside their points, moved until they hit neither marker, label nor an axis."""
    taken = [(x.at(p.x) - 7, y.at(p.y) - 7, x.at(p.x) + 7, y.at(p.y) + 7) for p in points]
    found = []
    for point in sorted(points, key=lambda p: y.at(p.y)):
        px, py = x.at(point.x), y.at(point.y)
        width = 6.3 * len(point.label)
        box, anchor, at = _place(px, py, width, y.start, taken)
        taken.append(box)
        found.append(_text(at[0], at[1], point.label, anchor, f"name {point.family}"))
    return found


Box = tuple[float, float, float, float]


def _place(
    px: float, py: float, width: float, bottom: float, taken: Sequence[Box]
) -> tuple[Box, str, tuple[float, float]]:
    options: list[tuple[Box, str, tuple[float, float]]] = []
    for dy in (0, -14, 14, -26, 26, -38, 38):
        middle = py + dy
        gap = 9 if dy == 0 else 3
        right = (px + gap, middle - 6, px + gap + width, middle + 6)
        left = (px - gap - width, middle - 6, px - gap, middle + 6)
        centred = (px - width / 2, middle - 6, px + width / 2, middle + 6)
        options.append((right, "start", (px + gap, middle + 4)))
        options.append((left, "end", (px - gap, middle + 4)))
        if dy:
            options.append((centred, "middle", (px, middle + 4)))

    def cost(option: tuple[Box, str, tuple[float, float]]) -> float:
        box = option[0]
        outside = box[0] < LEFT or box[2] > WIDTH or box[1] < 0 or box[3] > bottom
        hits = sum(_overlap(box, other) for other in taken)
        return 10 * outside + hits

    return min(options, key=cost)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    body = escape(text)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{body}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
