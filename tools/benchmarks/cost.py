"""What compressing costs beside SVD-LLM's steps as its paper and code have them, written plainly.

    python tools/benchmarks/cost.py pass --model models/SmolLM2-135M-Instruct --text FILE
    python tools/benchmarks/cost.py layer --rows 4096 --columns 11008

``pass`` calibrates on 32 x 512 tokens and factorises every linear, by ``svd_llm`` as ``svdexport
run`` does (with and without shared A's), and then the published way: whole forward passes, a second
moment for every linear, Cholesky factor, inverse and full SVD. ``layer`` takes one random layer
and a given second moment. Each prints a line for every part, and last one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.decompose import decompose
from svdexport.core.lowrank import FactorPair
from svdexport.models.blocks import Structure, discover
from svdexport.models.corpus import texts
from svdexport.models.loader import load_model, load_tokenizer
from svdexport.models.weights import Weights
from svdexport.pipeline.factors import Factorizer, moments_for
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Recipe


class Clock:
    """Seconds by part; a part may be entered many times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        return sum(self.seconds.values())

    def show(self, title: str) -> None:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        print(f"{title}: {self.total():.1f} s ({parts})", flush=True)


def published_factors(weight: Tensor, moment: Tensor, rank: int, clock: Clock) -> FactorPair:
    """SVD-LLM's whitening: H = S S^T, W S = U D V^T, B = U D^1/2, A = D^1/2 V^T S^-1.

    As the published code has it, Cholesky and inverse run in float64, the rest in float32.
    """
    with clock.part("cholesky"):
        root = _published_root(moment.double())
    with clock.part("inverse"):
        inverse = torch.linalg.inv(root).float()
    with clock.part("svd"):
        u, d, vt = torch.linalg.svd(weight.float() @ root.float(), full_matrices=False)
    with clock.part("products"):
        half = d[:rank].sqrt()
        return FactorPair(half[:, None] * (vt[:rank] @ inverse), u[:, :rank] * half)


def _published_root(moment: Tensor) -> Tensor:
    """The published way with a singular moment: lift it by its lowest eigenvalue."""
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        moment.diagonal().add_(1e-6 - torch.linalg.eigvalsh(moment)[0])
        root = torch.linalg.cholesky(moment)
    return root


def kept_rank(rows: int, columns: int, kept: float) -> int:
    return int(kept * rows * columns / (rows + columns))


def error(weight: Tensor, pair: FactorPair, moment: Tensor) -> float:
    """||(W - B A) X||_F in float64, with H = X X^T."""
    rest = weight.double() - pair.b.double() @ pair.a.double()
    return float(((rest @ moment.double()) * rest).sum().sqrt())


def layer(options: argparse.Namespace) -> dict[str, Any]:
    """One linear: Gaussian weights, inputs of unequal scale with a correlated part."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = options.rows, options.columns
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    scale = torch.logspace(0, -2, columns)[torch.randperm(columns, generator=generator)]
    mixing = torch.randn(columns, max(1, columns // 16), generator=generator)
    moment = (mixing @ mixing.T).double() + torch.eye(columns, dtype=torch.float64)
    moment *= (scale[:, None] * scale).double()
    rank = kept_rank(rows, columns, options.kept)
    ours, theirs = Clock(), Clock()
    with ours.part("decompose"):
        found = decompose([weight], moment, max_rank=rank).pair(rank)
    ours.show("ours")
    errors = [error(weight, found, moment)]
    print(f"error {errors[0]:.9g}", flush=True)
    published = published_factors(weight, moment, rank, theirs)
    theirs.show("published")
    errors.append(error(weight, published, moment))
    ratio, excess = theirs.total() / ours.total(), errors[0] / errors[1] - 1
    print(f"error {errors[1]:.9g}; {ratio:.1f} times faster, error {excess:+.1e} relative")
    return {
        "shape": [rows, columns],
        "rank": rank,
        "threads": torch.get_num_threads(),
        "seconds": ours.total(),
        "published_seconds": theirs.total(),
        "published_parts": theirs.seconds,
        "ratio": ratio,
        "error": errors[0],
        "published_error": errors[1],
        "relative_excess": excess,
    }


def recipe_of(options: argparse.Namespace, group: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "model": {"path": str(options.model.absolute())},
            "calibration": {
                "source": "file",
                "file": str(options.text.absolute()),
                "samples": options.samples,
                "length": options.length,
                "precision": options.precision,
            },
            "compress": {
                "method": "svd_llm",
                "group": group,
                "allocate": "uniform",
                "budget": {"param_ratio": options.kept},
            },
            "evaluate": {"text": str(options.text.absolute()), "context": 64, "windows": 1},
            "export": [{"format": "checkpoint"}],
        }
    )


def ours(recipe: Recipe, model: nn.Module, structure: Structure, tokens: Tensor) -> Clock:
    """Calibration and factors as a run makes them, the files of the factors with them."""
    clock, weights = Clock(), Weights(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = Factorizer(recipe, structure, weights, folder / "factors")
        quiet = Reporter(quiet=True)
        blocks = moments_for([recipe], structure, weights, tokens, folder, quiet)
        for _ in structure.blocks:
            with clock.part("calibrate"):
                moments = next(blocks)
            with clock.part("factorise"):
                worker.take(moments)
    return clock


def published(model: nn.Module, structure: Structure, tokens: Tensor, kept: float) -> Clock:
    """A second moment for every linear from whole forward passes; then every linear's factors."""
    clock, moments = Clock(), dict[str, Tensor]()
    with clock.part("calibrate"), contextlib.ExitStack() as stack, torch.no_grad():
        for linear in structure.linears():
            moment = moments[linear.name] = torch.zeros(linear.in_features, linear.in_features)

            def add(_m: Any, args: Any, _out: Any, moment: Tensor = moment) -> None:
                inputs = args[0].detach().float()
                moment += (inputs.transpose(1, 2) @ inputs).sum(dim=0)

            module = model.get_submodule(linear.name)
            stack.callback(module.register_forward_hook(add).remove)
        for sample in tokens:
            model(input_ids=sample[None], use_cache=False)
    for linear in structure.linears():
        weight: Tensor = model.get_submodule(linear.name).weight.data  # type: ignore[assignment]
        rank = kept_rank(linear.out_features, linear.in_features, kept)
        published_factors(weight, moments[linear.name], rank, clock)
    return clock


def whole_pass(options: argparse.Namespace) -> dict[str, Any]:
    model = load_model(options.model)
    structure = discover(model)
    recipe = recipe_of(options, group=True)
    tokenizer = load_tokenizer(options.model)
    tokens, _ = texts(recipe.calibration, recipe.evaluate, model, tokenizer, lambda *_: None)
    model.eval().requires_grad_(False)
    clocks = {}
    for title, group in (("ours", True), ("ours, no shared A", False)):
        clocks[title] = ours(recipe_of(options, group), model, structure, tokens)
        clocks[title].show(title)
    found: dict[str, Any] = {"tokens": tokens.numel(), "threads": torch.get_num_threads()}
    if options.published:
        clocks["published"] = published(model, structure, tokens, options.kept)
        clocks["published"].show("published")
        ratio = clocks["published"].total() / clocks["ours"].total()
        print(f"{ratio:.1f} times faster")
        found["ratio"] = ratio
    return found | {"seconds": {title: clock.seconds for title, clock in clocks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kept", type=float, default=0.8)
    what = parser.add_subparsers(required=True)
    one = what.add_parser("layer")
    one.add_argument("--rows", type=int, default=4096)
    one.add_argument("--columns", type=int, default=11008)
    one.set_defaults(run=layer)
    whole = what.add_parser("pass")
    whole.add_argument("--model", type=Path, required=True)
    whole.add_argument("--text", type=Path, required=True)
    whole.add_argument("--samples", type=int, default=32)
    whole.add_argument("--length", type=int, default=512)
    whole.add_argument("--precision", default="float32", help="calibration.precision")
    whole.add_argument("--no-published", dest="published", action="store_false")
    whole.set_defaults(run=whole_pass)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(options.run(options)))


if __name__ == "__main__":
    main()
