"""The frontier as a table, two pictures and a plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdexport.core.measures import Speedup
from svdexport.report import svg

_STYLE = """<style>
svg{font:11px system-ui,sans-serif;background:#fff}
.grid{stroke:#ddd}.tick,.axis{fill:#555}.name{fill:#111}
.open{fill:none;stroke:#b45309;stroke-width:2}.fill{fill:#1d4ed8}
</style>"""


@dataclass(frozen=True)
class Point:
    """One measured file. Speedups are against llama.cpp's Q4_0; None where not timed."""

    name: str
    file: str
    bytes: int
    plain: bool
    perplexity: float
    mean_kld: float
    prefill: Speedup | None = None
    decode: Speedup | None = None


def pictures(points: Sequence[Point]) -> dict[str, str]:
    """File name -> SVG: divergence over megabytes, and over prefill and decode speed."""
    made = {"quality-bytes.svg": _picture(points, "size", "MB")}
    for kind in ("prefill", "decode"):
        timed = [p for p in points if getattr(p, kind) is not None]
        if timed:
            made[f"quality-{kind}.svg"] = _picture(timed, kind, f"{kind}, times Q4_0")
    return made


def _picture(points: Sequence[Point], what: str, title: str) -> str:
    drawn = []
    for p in points:
        x = p.bytes / 1e6 if what == "size" else getattr(p, what).median
        role = "plain" if p.plain else "compressed"
        drawn.append(svg.Point(x, p.mean_kld, p.name, "gguf", role, p.name))
    chart = svg.scatter(drawn, title, "KLD to the dense model", f"quality against {title}")
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<title>", _STYLE + "<title>", 1
    )


def page(points: Sequence[Point]) -> str:
    """Markdown: the table, the pictures, the sentence."""
    lines = [
        "| file | MB | perplexity | KLD | prefill | decode |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        name = f"llama.cpp {p.name}" if p.plain else f"svdexport {p.name}"
        speeds = " | ".join(_speed(s) for s in (p.prefill, p.decode))
        lines.append(
            f"| {name} | {p.bytes / 1e6:.1f} | {p.perplexity:.2f} | {p.mean_kld:.4f} | {speeds} |"
        )
    shown = "\n".join(f"![{name}]({name})" for name in pictures(points))
    return "\n".join([*lines, "", sentence(points), "", shown, ""])


def _speed(speedup: Speedup | None) -> str:
    if speedup is None:
        return "-"
    return f"{speedup.median:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"


def sentence(points: Sequence[Point]) -> str:
    """Where ours is better: no larger than ours, does a plain file diverge less?"""
    plain = [p for p in points if p.plain]
    better: list[str] = []
    worse: list[str] = []
    alone: list[str] = []
    for own in (p for p in points if not p.plain):
        rivals = [p.mean_kld for p in plain if p.bytes <= own.bytes]
        if rivals:
            (better if own.mean_kld < min(rivals) else worse).append(own.name)
        else:
            farther = [p.name for p in plain if p.mean_kld > own.mean_kld]
            said = f"nearer than {', '.join(farther)}" if farther else "nearer than none of them"
            alone.append(f"{own.name} is {said}")
    parts = []
    if better:
        parts.append(
            f"At {', '.join(better)} svdexport's file diverges less from the dense model than "
            "any of llama.cpp's plain files that are not larger."
        )
    if worse:
        parts.append(
            f"At {', '.join(worse)} a plain file of llama.cpp that is no larger is nearer."
        )
    if alone and plain:
        parts.append(f"All plain files are larger than these: {'; '.join(alone)}.")
    return " ".join(parts)
