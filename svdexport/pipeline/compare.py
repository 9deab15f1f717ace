"""``compare``: the methods side by side on the same tokens, at several budgets."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdexport import __version__
from svdexport.allocate import STRATEGIES
from svdexport.core.linears import is_transposed
from svdexport.core.machine import describe
from svdexport.errors import RecipeError
from svdexport.factorize import METHODS, split_outputs
from svdexport.models.blocks import Structure, discover
from svdexport.models.corpus import texts
from svdexport.models.loader import load_model, load_tokenizer, open_source
from svdexport.models.weights import Weights
from svdexport.pipeline.compress import GroupPlan, allocate_ranks, plan_rows
from svdexport.pipeline.factor_files import factors_file, pair_at
from svdexport.pipeline.factors import Factorizer, moments_for
from svdexport.pipeline.reporter import Reporter
from svdexport.pipeline.sequential import refactor_in_sequence
from svdexport.pipeline.trials import measured
from svdexport.recipe import Compress, Recipe, did_you_mean
from svdexport.recipe.settings import Settings
from svdexport.report.comparison import Comparison, Entry, Figure, earlier, write
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.verify.quality import evaluate


@dataclass(frozen=True)
class Contender:
    """A method as its paper uses it: allocation, whether linears share an A, and sequence."""

    label: str
    method: str
    allocate: str = "uniform"
    group: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    allocation: tuple[tuple[str, Any], ...] = ()
    sequential: bool = False


# In the order in which the papers report them, worst first; then ours. lorc and emb_ae are left
# out: they compress other parts of the model, so the same kept ratio means something else there.
# What is costly is cut to minutes on two cores for a model of 135M parameters.
CONTENDERS = (
    Contender("svd", "svd"),
    Contender("fwsvd", "fwsvd"),
    Contender("tfwsvd", "tfwsvd", settings=(("iterations", 2), ("steps", 3))),
    Contender("asvd", "asvd"),
    Contender(
        "asvd, sensitivity",
        "asvd",
        "asvd",
        allocation=(("ratios", (0.3, 0.5, 0.7, 0.9)), ("samples", 1), ("length", 128)),
    ),
    Contender("basis_sharing", "basis_sharing", settings=(("refit", True),)),
    Contender("svd_llm", "svd_llm"),
    Contender("svd_llm, grouped", "svd_llm", group=True),
    Contender("svd_llm_v2", "svd_llm_v2", "svd_llm_v2"),
    Contender("adasvd", "adasvd", "adacr"),
    Contender("dobi_svd", "dobi_svd", "dobi_svd", allocation=(("iterations", 4), ("samples", 4))),
    Contender("kfac_svd", "kfac_svd", "greedy"),
    Contender("kfac_svd, grouped", "kfac_svd", "greedy", group=True),
    Contender("kfac_svd, both labels", "kfac_svd", "greedy", settings=(("labels", "both"),)),
    Contender(
        "kfac_svd, in sequence",
        "kfac_svd",
        "greedy",
        settings=(("labels", "both"),),
        sequential=True,
    ),
)


def compare(
    recipe: Recipe,
    ratios: Sequence[float],
    labels: Sequence[str],
    out: Path,
    threads: int,
    reporter: Reporter,
) -> Comparison:
    """Perplexity of every contender at every kept ratio, by torch in float32.

    One calibration pass collects the statistics of all contenders; contenders that differ only in
    their allocation share their factors. ``compare.json``, ``compare.md`` and ``compare.svg`` in
    ``out`` are rewritten as figures come in; those that are there already, of the same contenders
    on the same tokens, are not taken again. Factors lie in a folder beside them, removed at the
    end.

    Args:
        recipe: gives model, calibration and evaluation text, and of ``compress`` all keys but
            method, settings, allocate, allocation, group and budget.
        labels: contenders to run; empty for all.

    Raises:
        RecipeError: an unknown label, or a budget that a contender cannot meet.
    """
    chosen = _chosen(labels)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compare-", dir=out) as work:
        return _compare(recipe, ratios, chosen, out, Path(work), threads, reporter)


def _compare(
    recipe: Recipe,
    ratios: Sequence[float],
    chosen: Sequence[Contender],
    out: Path,
    work: Path,
    threads: int,
    reporter: Reporter,
) -> Comparison:
    source = open_source(recipe.model, work)
    model = load_model(source.folder, source.trust_remote_code)
    tokenizer = load_tokenizer(source.folder, source.trust_remote_code)
    with reporter.stage("text"):
        calibration, windows = texts(
            recipe.calibration, recipe.evaluate, model, tokenizer, reporter.progress
        )
    place = _Place(recipe, source.folder, model, discover(model), calibration, windows, threads)
    identity = place.identity(ratios)
    done = place.done(earlier(out, identity))
    recipes = {c.label: place.recipe_of(c, ratios[0]) for c in chosen if c.label not in done}
    with reporter.stage("dense"):
        dense = place.perplexity()
    with reporter.stage("factors"):
        folders = place.factorize(recipes, work, reporter)
    found = Comparison(
        identity=identity,
        model=source.given.name,
        dense=dense,
        ratios=tuple(ratios),
        calibration_tokens=calibration.numel(),
        evaluation_tokens=windows.numel(),
        machine=describe(),
        entries=(),
    )
    for contender in CONTENDERS:
        if contender in chosen and contender.label not in done:
            with reporter.stage(contender.label):
                figures = place.figures(contender, ratios, folders[contender.label], reporter)
            done[contender.label] = place.entry(contender, figures)
        order = [c.label for c in CONTENDERS if c.label in done]
        found = dataclasses.replace(found, entries=tuple(done[label] for label in order))
        write(found, out)
    return found


def _chosen(labels: Sequence[str]) -> list[Contender]:
    known = [contender.label for contender in CONTENDERS]
    for label in labels:
        if label not in known:
            raise RecipeError(f"compare: no contender {label[:60]!r}{did_you_mean(label, known)}")
    return [c for c in CONTENDERS if not labels or c.label in labels]


@dataclass(frozen=True)
class _Place:
    """What all contenders share."""

    recipe: Recipe
    folder: Path
    model: nn.Module
    structure: Structure
    calibration: Tensor
    windows: Tensor
    threads: int

    def recipe_of(self, contender: Contender, ratio: float) -> Recipe:
        """The recipe with the contender's own keys."""
        base = self.recipe.compress.model_dump()
        own = {
            "method": contender.method,
            "settings": dict(contender.settings),
            "allocate": contender.allocate,
            "allocation": dict(contender.allocation),
            "group": contender.group,
            "sequential": contender.sequential,
            "budget": {"param_ratio": ratio},
        }
        given = self.recipe.compress  # its own keys, where it names this very method or strategy
        if given.method == contender.method:
            own["settings"] = dict(contender.settings) | _set_keys(given.settings)
        if given.allocate == contender.allocate:
            own["allocation"] = dict(contender.allocation) | _set_keys(given.allocation)
        return self.recipe.model_copy(update={"compress": Compress.model_validate(base | own)})

    def identity(self, ratios: Sequence[float]) -> str:
        """Of what all contenders share, so that figures of another run can stand beside these."""
        own = {"method", "settings", "allocate", "allocation", "group", "budget", "sequential"}
        shared = [
            __version__,
            self.recipe.compress.model_dump(mode="json", exclude=own),
            self.recipe.calibration.precision,
            list(ratios),
        ]
        digest = hashlib.sha256(json.dumps(shared).encode())
        for tokens in (self.calibration, self.windows):
            digest.update(tokens.numpy().tobytes())
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode() + weight.float().numpy().tobytes())
        return digest.hexdigest()

    def entry(self, contender: Contender, figures: tuple[Figure, ...]) -> Entry:
        compress = self.recipe_of(contender, 1.0).compress
        return Entry(
            contender.label,
            METHODS[contender.method].source,
            contender.method,
            compress.settings.model_dump(mode="json"),
            contender.allocate,
            compress.allocation.model_dump(mode="json"),
            contender.group,
            figures,
            contender.sequential,
        )

    def done(self, entries: Sequence[Entry]) -> dict[str, Entry]:
        """Earlier entries of contenders that are what they were, by label."""
        wanted = {c.label: self.entry(c, ()) for c in CONTENDERS}
        return {
            entry.label: entry
            for entry in entries
            if dataclasses.replace(entry, figures=()) == wanted.get(entry.label)
        }

    def factorize(
        self, recipes: dict[str, Recipe], work: Path, reporter: Reporter
    ) -> dict[str, Path]:
        """Folders of factors by label; one for all that factorise alike."""
        folders: dict[str, Path] = {}
        workers: dict[str, Factorizer] = {}
        for label, recipe in recipes.items():
            what = recipe.compress
            alike = json.dumps(
                [what.method, what.settings.model_dump(), what.group, what.sequential]
            )
            if alike not in workers:
                folder = work / f"factors-{len(workers)}"
                workers[alike] = Factorizer(recipe, self.structure, self.model, folder)
            folders[label] = workers[alike].folder
        scratch = work / "scratch"
        scratch.mkdir()
        for moments in moments_for(
            list(recipes.values()),
            self.structure,
            Weights(self.model),
            self.calibration,
            scratch,
            reporter,
        ):
            for worker in workers.values():
                worker.take(moments)
        return folders

    def figures(
        self, contender: Contender, ratios: Sequence[float], folder: Path, reporter: Reporter
    ) -> tuple[Figure, ...]:
        """One contender at every budget; what does not depend on the budget is measured once."""
        found: list[Figure] = []
        more: dict[str, dict[str, Any]] = {}
        for ratio in ratios:
            began = time.perf_counter()
            recipe = self.recipe_of(contender, ratio)
            wanted = STRATEGIES[contender.allocate].measure
            if wanted == "positions" or (wanted == "sensitivity" and not more):
                more = measured(
                    recipe, self.structure, folder, self.model, self.calibration, reporter.progress
                )
            kept, perplexity = self.figure(recipe, folder, more, reporter)
            seconds = time.perf_counter() - began
            reporter.note(f"kept {kept:.3f}: perplexity {perplexity:.2f}, {seconds:.0f} s")
            found.append(Figure(ratio, kept, perplexity, seconds))
        return tuple(found)

    def figure(
        self, recipe: Recipe, folder: Path, more: dict[str, dict[str, Any]], reporter: Reporter
    ) -> tuple[float, float]:
        """Share of the parameters that is kept, and perplexity."""
        plan = allocate_ranks(recipe, self.structure, folder, more)
        rows = plan_rows(plan)
        kept = sum(row.params for row in rows) / sum(row.params_dense for row in rows)
        if recipe.compress.sequential:
            made = self._in_sequence(recipe, plan, folder, reporter)
        else:
            made = _products(recipe.compress, plan, folder)
        with self._in_place(made):
            return kept, self.perplexity()

    def perplexity(self) -> float:
        """Of the model as it stands, on the evaluation windows."""
        runtime = TorchRuntime(self.folder, self.threads, self.model)
        return evaluate(runtime, self.windows.numpy()).perplexity

    def _in_sequence(
        self, recipe: Recipe, plan: list[GroupPlan], folder: Path, reporter: Reporter
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights (m, n) of what is factored and fitted anew, by the linear's name."""
        tensors: dict[str, Tensor] = {}
        for block in refactor_in_sequence(
            recipe,
            Weights(self.model),
            self.structure,
            plan,
            self.calibration,
            folder,
            reporter.progress,
        ):
            tensors |= block  # all of them before any is put in place: the walk needs the model
        for entry in plan:
            a = tensors.get(f"{entry.group.leader}.lr_a.weight")
            for member in entry.group.members:
                if a is not None:
                    yield member.name, tensors[f"{member.name}.lr_b.weight"] @ a
                elif f"{member.name}.weight" in tensors:
                    yield member.name, tensors[f"{member.name}.weight"]

    @contextlib.contextmanager
    def _in_place(self, made: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
        """The model's linears have these weights (m, n) while the context lasts."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for name, new in made:
                module = self.model.get_submodule(name)
                weight: Tensor = module.weight  # type: ignore[assignment]
                before.append((weight, weight.data))
                weight.data = (new.T if is_transposed(module) else new).contiguous()
            yield
        finally:
            for weight, data in before:
                weight.data = data


def _products(
    compress: Compress, plan: list[GroupPlan], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """The products B A (m, n) of the plan's pairs, by the linear's name."""
    for entry in plan:
        if entry.allocation.rank is None:
            continue
        path = factors_file(folder, entry.group.block)
        leader, members = entry.group.leader, entry.group.members
        pair = pair_at(compress, _of_leader(path, leader), leader, entry.allocation.rank)
        parts = split_outputs(pair.dense(), [member.out_features for member in members])
        yield from zip((member.name for member in members), parts, strict=True)


def _set_keys(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(exclude_unset=True)


def _of_leader(path: Path, leader: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{leader}.")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}
