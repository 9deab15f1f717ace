"""``form: stock_lora`` with ``base: weight``: pairs that carry what quantising the base loses.

The base is the quantised original, Q(W), and the adapter the best pair for W - Q(W) in the metric
of the calibration's moments: LQER (Zhang et al., ICML 2024, arXiv 2402.02446) with the exact
solution of QERA (Zhang et al., ICLR 2025, arXiv 2410.06040), and output gradients weighted as the
recipe's method weights them. The pairs of the compression give the ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.core.decompose import decompose
from svdexport.core.moments import Statistic
from svdexport.export.gguf_importance import read_importance
from svdexport.export.gguf_stock import ADAPTER_PARTS, FITTED
from svdexport.export.gguf_types import Types, held
from svdexport.factorize import METHODS
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.weights import Weights
from svdexport.packed import GGUF_PART, PackedWeight, write_packed
from svdexport.pipeline.artifacts import artifact_name
from svdexport.pipeline.job import Job, ModelUnderWork, key
from svdexport.pipeline.stages import Compressed
from svdexport.recipe import Export, GgufExport
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import to_float32

MOMENTS: frozenset[Statistic] = frozenset({"inputs", "gradients"})


def fit_adapters(job: Job, model: ModelUnderWork, compressed: Compressed) -> dict[Export, Path]:
    """Folders of fitted pairs, by the exports that want them; none without pairs."""
    specs = [s for s in job.recipe.export if isinstance(s, GgufExport) and s.base == "weight"]
    low_rank = Checkpoint.open(compressed.checkpoint).low_rank
    if not specs or not low_rank:
        return {}
    folders: dict[Export, Path] = {
        spec: job.work / "quantized" / artifact_name(spec) for spec in specs
    }

    def make() -> None:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _fit_all(job, model, compressed, low_rank, folders)

    job.stage("adapters", key(compressed.key, specs), list(folders.values()), make)
    return folders


def _fit_all(
    job: Job,
    model: ModelUnderWork,
    compressed: Compressed,
    low_rank: Mapping[str, PairSpec],
    folders: Mapping[Export, Path],
) -> None:
    torch.set_num_threads(job.threads)
    before: dict[Export, float] = dict.fromkeys(folders, 0.0)
    after: dict[Export, float] = dict.fromkeys(folders, 0.0)
    importance = read_importance(job.work / "base", {}).values
    for moments in calibrate(
        model.weights,
        model.structure,
        load_file(compressed.tokens)["calibration"],
        batch=job.recipe.calibration.batch,
        precision=job.recipe.calibration.precision,
        statistics=MOMENTS & METHODS[job.recipe.compress.method].needs,
        scratch=job.work,
        progress=job.reporter.progress,
    ):
        members = [m.name for g in model.structure.of_block(moments.block) for m in g.members]
        for spec, folder in folders.items():
            assert isinstance(spec, GgufExport)
            packed: dict[str, PackedWeight] = {}
            for name in filter(low_rank.__contains__, members):
                weights = importance.get(f"{name}.inputs") if spec.importance else None
                error = base_error(model.weights, name, spec, weights)
                pair, lost, left = fit(
                    error, low_rank[name].rank, moments, name, job.recipe.compress.damping
                )
                before[spec], after[spec] = before[spec] + lost, after[spec] + left
                for part, factor in zip(ADAPTER_PARTS, pair, strict=True):
                    packed[f"{name}{part}"] = PackedWeight(FITTED, {GGUF_PART: factor.numpy()})
            write_packed(folder / f"block_{moments.block:04d}.safetensors", packed)
    for spec in folders:
        share = after[spec] / before[spec] if before[spec] > 0.0 else 0.0
        job.reporter.note(
            f"{artifact_name(spec)}: the adapter's pairs leave {share:.1%} of the quantised base's "
            "squared error in the moments' metric"
        )


def base_error(
    weights: Weights, name: str, spec: GgufExport, importance: np.ndarray | None
) -> Tensor:
    """W - Q(W), (m, n) float32: Q as the exporter rounds the base. Rows are rounded one by one,
    so that the order in which a converter puts them does not matter."""
    weight = weights.linear(name).float().contiguous()
    type_name = held(Types.of(spec, tied=False).linear, weight.shape[1])
    rows = quantize(weight.numpy(), type_name, importance)
    return weight - torch.from_numpy(to_float32(rows, type_name))


def fit(
    error: Tensor, rank: int, moments: BlockMoments, name: str, damping: float
) -> tuple[tuple[Tensor, Tensor], float, float]:
    """(A, B) of the rank for an error E, and E's squared norm in the metric without and with it."""
    gradients = [moments.gradients[name].matrix] if name in moments.gradients else None
    found = decompose(
        [error], moments.inputs[name].matrix, gradients, max_rank=rank, output_damping=damping
    )
    pair = found.pair(min(rank, found.a.shape[0]))
    return (pair.a, pair.b), float(found.energies.sum()), float(found.energies[pair.rank :].sum())
