"""Output error against bits per weight of one wide linear: dense, pair and residual at every type.

    python tools/benchmarks/wide_layer.py --to docs/images [--shape 5632 2048] [--forms dense pair]

A random W with singular values i^-0.7 and inputs whose moment has eigenvalues i^-1 in a basis of
its own. All is quantised by svdexport's GPTQ, the pairs and residuals fitted in the metric of
the inputs; the figure is tr(R H R^T) / tr(W H W^T). No sampling: the moment is exact.

Forms: ``dense``; ``pair`` with A and B of one type; ``split``, two pairs side by side, the leading
components at 8 bits and the tail lower (``bits by component``); ``residual``, a base and a pair of
what it lost, fitted in turn; ``plain``, a dense weight by ggml's own quantiser, with importance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from svdexport.core.decompose import decompose
from svdexport.core.gauge import in_even_gauge, mixed
from svdexport.core.gptq import GptqConfig, gptq, gptq_pair, relative_error
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.lowrank import FactorPair
from svdexport.core.residual import fit_residual
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import BLOCKS, to_float32

LOW, HIGH = 1.5, 4.6  # bits per weight
CONFIG = GptqConfig(0.001, sweeps=0)
DENSE = ("Q2_K", "Q3_K", "Q4_0", "IQ4_NL", "Q4_K")
PLAIN = ("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K")
PAIR_RANKS = (256, 512, 768, 1024, 1536, 2048)
PAIR_TYPES = ("Q2_K", "Q3_K", "Q4_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SPLITS = ((256, "Q8_0"),)
RESIDUAL_RANKS = (32, 128)
RESIDUAL_TYPES = ("Q8_0", "Q4_0")
COLOURS = {
    "dense": "#1d4ed8", "plain": "#64748b", "pair": "#b45309", "split": "#a21caf",
    "residual": "#047857",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    form: str
    types: str
    rank: int | None
    bits: float
    error: float
    seconds: float


@dataclass(frozen=True)
class Layer:
    """W (m, n), its inputs' moment H (n, n), and its best pairs in that metric."""

    weight: Tensor
    moment: Tensor

    @classmethod
    def make(cls, m: int, n: int, spectrum: float, correlation: float, seed: int) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        k = min(m, n)
        left = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.double()
        weight = left * torch.arange(1, k + 1) ** -spectrum @ right.T
        moment = basis * torch.arange(1, n + 1).double() ** -correlation @ basis.T
        return cls(weight, moment)

    def bits(self, type_name: str, rank: int | None = None) -> float:
        """Per weight of W: of the dense matrix, or of a pair's two factors."""
        block, size = BLOCKS[type_name]
        m, n = self.weight.shape
        share = 1.0 if rank is None else rank * (m + n) / (m * n)
        return size * 8 / block * share

    def error(self, values: Tensor) -> float:
        return relative_error(self.weight, values, self.moment)


def dense(layer: Layer) -> Iterator[tuple[str, int | None, float, float]]:
    for name in DENSE:
        found = gptq(layer.weight, layer.moment, GRIDS[name], CONFIG)
        yield name, None, layer.bits(name), found.error


def plain(layer: Layer) -> Iterator[tuple[str, int | None, float, float]]:
    importance = (layer.moment.diagonal() / layer.moment.diagonal().mean()).float().numpy()
    for name in PLAIN:
        packed = quantize(layer.weight.numpy(), name, importance)
        values = torch.from_numpy(to_float32(packed, name).copy())
        yield name, None, layer.bits(name), layer.error(values)


def _best(weight: Tensor, moment: Tensor) -> Callable[[int], FactorPair]:
    """The best pair of each rank, in the gauge in which svdexport writes pairs."""
    found = in_even_gauge(decompose([weight], moment), moment)

    def of(rank: int) -> FactorPair:
        pair = found.pair(rank)
        return FactorPair(*mixed(pair.a, pair.b))

    return of


def pair(layer: Layer) -> Iterator[tuple[str, int | None, float, float]]:
    best = _best(layer.weight, layer.moment)
    for name in PAIR_TYPES:
        for rank in PAIR_RANKS:
            if rank <= min(layer.weight.shape) and LOW <= layer.bits(name, rank) <= HIGH:
                a, b = gptq_pair(best(rank), layer.moment, GRIDS[name], GRIDS[name], CONFIG)
                yield name, rank, layer.bits(name, rank), layer.error(b.values @ a.values)


def split(layer: Layer) -> Iterator[tuple[str, int | None, float, float]]:
    """The tail's pair is fitted to what the rounded leading pair leaves of W."""
    w, h = layer.weight, layer.moment
    best = _best(w, h)
    for lead, high in SPLITS:
        one_a, one_b = gptq_pair(best(lead), h, GRIDS[high], GRIDS[high], CONFIG)
        rest = w - one_b.values @ one_a.values
        tail = _best(rest, h)
        for low in ("Q2_K", "Q3_K"):
            for rank in (256, 512, 1024):
                bits = layer.bits(high, lead) + layer.bits(low, rank)
                if LOW <= bits <= HIGH:
                    a, b = gptq_pair(tail(rank), h, GRIDS[low], GRIDS[low], CONFIG)
                    values = one_b.values @ one_a.values + b.values @ a.values
                    yield f"{lead} x {high} + {low}", lead + rank, bits, layer.error(values)


def residual(layer: Layer) -> Iterator[tuple[str, int | None, float, float]]:
    w, h = layer.weight, layer.moment
    for base in ("Q2_K", "Q3_K"):
        first = gptq(w, h, GRIDS[base], CONFIG).values

        def quantise(values: Tensor, base: str = base, first: Tensor = first) -> Tensor:
            same = torch.equal(values, w)
            return first if same else gptq(values, h, GRIDS[base], CONFIG).values

        for factors in RESIDUAL_TYPES:

            def rounded(found: FactorPair, factors: str = factors) -> FactorPair:
                a, b = gptq_pair(found, h, GRIDS[factors], GRIDS[factors], CONFIG)
                return FactorPair(a.values, b.values)

            for rank in RESIDUAL_RANKS:
                bits = layer.bits(base) + layer.bits(factors, rank)
                if bits <= HIGH:
                    found = fit_residual(w, h, rank, quantise, round_pair=rounded, rounds=2)
                    yield f"{base} + {factors}", rank, bits, min(found.losses)


DEFAULT = ["dense", "pair", "split", "residual"]
FORMS = {"dense": dense, "plain": plain, "pair": pair, "split": split, "residual": residual}


def measured(layer: Layer, forms: list[str]) -> list[Point]:
    points = []
    for form in forms:
        start = time.process_time()
        for types, rank, bits, error in FORMS[form](layer):
            seconds = time.process_time() - start
            points.append(Point(form, types, rank, bits, error, seconds))
            print(_row(points[-1]), flush=True)
            start = time.process_time()
    return points


def _row(p: Point) -> str:
    rank = "-" if p.rank is None else str(p.rank)
    return f"| {p.form} | {p.types} | {rank} | {p.bits:.2f} | {p.error:.2e} | {p.seconds:.0f} |"


@lru_cache
def _scales(errors: tuple[float, ...]) -> tuple[float, float]:
    return min(errors) / 1.3, max(errors) * 1.3


def picture(points: list[Point], path: Path, title: str) -> None:
    """An SVG: error (logarithmic) over bits per weight, one line per form and type."""
    import math

    width, height, left, bottom = 760, 460, 64, 48
    low, high = _scales(tuple(p.error for p in points))

    def x(bits: float) -> float:
        return left + (bits - LOW) / (HIGH - LOW) * (width - left - 150)

    def y(error: float) -> float:
        share = math.log(error / low) / math.log(high / low)
        return height - bottom - share * (height - bottom - 36)

    parts = [f'<text x="{left}" y="18" class="t">{title}</text>']
    for tick in (1.5, 2, 2.5, 3, 3.5, 4, 4.5):
        parts.append(
            f'<line class="g" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="36" '
            f'y2="{height - bottom}"/>'
        )
        parts.append(
            f'<text x="{x(tick):.1f}" y="{height - 30}" text-anchor="middle">{tick:g}</text>'
        )
    for power in range(-6, 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if low <= value <= high:
                parts.append(
                    f'<line class="g" x1="{left}" x2="{width - 150}" y1="{y(value):.1f}" '
                    f'y2="{y(value):.1f}"/>'
                )
                parts.append(
                    f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
                    f"{value:g}</text>"
                )
    parts.append(
        f'<text x="{(left + width - 150) / 2}" y="{height - 10}" text-anchor="middle">'
        "bits per weight</text>"
    )
    parts.append(
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" '
        'text-anchor="middle">squared output error, relative</text>'
    )
    for index, form in enumerate(dict.fromkeys(p.form for p in points)):
        colour = COLOURS[form]
        parts.append(f'<circle cx="{width - 132}" cy="{50 + 20 * index}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{width - 122}" y="{54 + 20 * index}">{form}</text>')
        mine = [p for p in points if p.form == form]
        lines = {p.types if p.rank is not None else form: [] for p in mine}
        for p in mine:
            lines[p.types if p.rank is not None else form].append((p.bits, p.error))
        for name, found in lines.items():
            way = " ".join(f"{x(b):.1f},{y(e):.1f}" for b, e in sorted(found))
            parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}"/>')
            parts += [
                f'<circle cx="{x(b):.1f}" cy="{y(e):.1f}" r="2.6" fill="{colour}"><title>'
                f"{name}: {b:.2f} bits, {e:.2e}</title></circle>"
                for b, e in found
            ]
    style = "text{font:11px system-ui,sans-serif;fill:#333}.t{font-size:13px}.g{stroke:#e5e5e5}"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}'
        f'</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[5632, 2048], metavar=("M", "N"))
    parser.add_argument("--spectrum", type=float, default=0.7)
    parser.add_argument("--correlation", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=DEFAULT)
    parser.add_argument("--to", type=Path, default=Path())
    options = parser.parse_args()
    torch.set_num_threads(1)
    m, n = options.shape
    layer = Layer.make(m, n, options.spectrum, options.correlation, options.seed)
    print("| form | types | rank | bits per weight | error | CPU s |\n|---|---|---|---|---|---|")
    points = measured(layer, options.forms)
    options.to.mkdir(parents=True, exist_ok=True)
    title = f"{m} x {n}, singular values i^-{options.spectrum:g}, inputs i^-{options.correlation:g}"
    data = {"shape": [m, n], "title": title, "points": [asdict(p) for p in points]}
    (options.to / "wide-layer.json").write_text(json.dumps(data, indent=1) + "\n")
    picture(points, options.to / "wide-layer.svg", title)


if __name__ == "__main__":
    main()
