"""The quantize stage in a run: the files hold its values bit for bit, and they are the better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.grids_onnx import NBitsGrid, PackedNBits, dequantize, unpack
from svdexport.errors import RecipeError
from svdexport.export import exporter
from svdexport.models.loader import load_model
from svdexport.packed import PackedFolder
from svdexport.pipeline.job import ModelUnderWork
from svdexport.pipeline.quantize import quantize_exports
from svdexport.pipeline.reporter import Reporter
from svdexport.pipeline.stages import run_compression
from svdexport.pipeline.start import started
from svdexport.recipe import load_recipe
from svdexport.refine import REFINERS, Refined, RefineData, Refiner
from tests.unit.gguf_models import make_model

RECIPE = """\
schema: 1
model: {{path: model}}
calibration: {{samples: 6, length: 64, seed: 1}}
compress: {compress}
quantize: {{algorithm: {algorithm}}}
export: [{exports}]
evaluate: {{context: 48, windows: 2}}
"""
PAIRS = "{method: svd_llm, budget: {param_ratio: 0.6}, rank_multiple: 32}"
SIZES = {"hidden_size": 256, "intermediate_size": 256}


def exported(folder: Path, name: str, **parts: str) -> tuple[list[Path], Path]:
    """Run up to the exports; the files and the work folder of the run."""
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(**parts))
    files = api.export(path, folder / name, reporter=Reporter(quiet=True))
    return files, folder / f".{name}.work"


def packed_values(packed: PackedFolder, name: str, columns: int) -> np.ndarray:
    weight = packed.read(name)
    if weight.kind in GRIDS:
        grid = GRIDS[weight.kind]
        codes, scales = grid.unpack(torch.from_numpy(weight.parts["data"]))
        return grid.steps(scales).values(codes).numpy()
    _, bits, block, kind = weight.kind.split("-")
    nbits = NBitsGrid(int(bits), int(block), kind == "symmetric")
    parts = PackedNBits(weight.parts["weight"], weight.parts["scales"], weight.parts.get("zeros"))
    return dequantize(unpack(parts, columns, nbits))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    make_model(folder / "model", "Llama", **SIZES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_files_hold_the_quantised_values_bit_for_bit(place: Path, algorithm: str) -> None:
    exports = (
        "{format: gguf, type: Q4_0}, {format: gguf, type: Q4_K, form: stock},"
        "{format: onnx, precision: int4}"
    )
    files, work = exported(place, algorithm, compress=PAIRS, algorithm=algorithm, exports=exports)
    checkpoint = Checkpoint.open(work / "checkpoint")
    assert checkpoint.low_rank
    for file in files:
        packed = PackedFolder.open(work / "quantized" / file.name)
        assert packed.kinds
        kind = exporter("gguf" if file.suffix == ".gguf" else "onnx")
        read = dict(kind.read_back(file, checkpoint, place / "model", None, work / "base"))
        seen = set(read) & set(packed.kinds)
        assert seen == set(packed.kinds)
        for name in seen:
            values = packed_values(packed, name, read[name].shape[1])
            np.testing.assert_array_equal(read[name], values, err_msg=f"{file.name} {name}")


@pytest.mark.slow
def test_a_dense_file_of_the_same_size_is_nearer_to_the_model_than_ggmls(place: Path) -> None:
    exports = "{format: gguf, type: Q4_0}, {format: gguf, type: Q3_K}"
    files, work = exported(
        place, "dense", compress="{method: none}", algorithm="gptq", exports=exports
    )
    source = Checkpoint.open(place / "model")
    for file in files:
        twin = work / "dense" / file.name
        assert file.stat().st_size == twin.stat().st_size
        packed = PackedFolder.open(work / "quantized" / file.name)
        assert len(packed.kinds) == 14
        gguf: Any = exporter("gguf")
        ours, theirs = (
            dict(gguf.read_back(path, source, place / "model", None, work / "base"))
            for path in (file, twin)
        )
        assert not any(np.array_equal(ours[name], theirs[name]) for name in packed.kinds)
        for name in set(ours) - set(packed.kinds):
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["{method: none}", PAIRS])
def test_in_sequence_the_model_comes_nearer_to_the_original(place: Path, compress: str) -> None:
    """Each linear makes up for what was lost before it: seen in the last hidden states."""
    kind = "pairs" if compress == PAIRS else "plain"
    gguf: Any = exporter("gguf")
    distances = []
    for more in ("", ", sequential: true"):
        (file,), work = exported(
            place,
            f"{kind}-{bool(more)}",
            compress=compress,
            algorithm=f"gptq{more}",
            exports="{format: gguf, type: Q4_0}",
        )
        tokens = load_file(work / "tokens.safetensors")["calibration"]
        folder = place / "model" if kind == "plain" else work / "checkpoint"
        model = load_model(folder)
        read = gguf.read_back(file, Checkpoint.open(folder), place / "model", None, work / "base")
        values = {name: torch.from_numpy(array.copy()) for name, array in read}
        assert not model.load_state_dict(values, strict=False).unexpected_keys
        wanted = last_hidden(load_model(place / "model"), tokens)
        distances.append(float((last_hidden(model, tokens) - wanted).norm()))
    assert distances[1] < 0.95 * distances[0]


def _shaken(data: RefineData, config: Any) -> Refined:
    """A refiner that moves every pair and every dense linear by a fifth of its size."""
    torch.manual_seed(4)
    found = {
        name: value + 0.2 * value.std() * torch.randn_like(value)
        for name, value in data.student.module.named_parameters()
        if value.ndim == 2 and ".layers." in name
    }
    return Refined(found, ())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("sequential", ["false", "true"])
def test_in_sequence_a_refined_model_stays_refined(
    place: Path, monkeypatch: pytest.MonkeyPatch, sequential: str, dense: bool
) -> None:
    """Seen in the first group, whose inputs nothing changes."""
    monkeypatch.setitem(REFINERS, "sequential_ls", Refiner("shaken", "", "", _shaken))
    ignore = "'re:[qkv]_proj'" if dense else ""
    recipe, out = place / "refined.yaml", place / f"refined-{sequential}-{dense}"
    recipe.write_text(
        RECIPE.format(
            compress=f"{PAIRS[:-1]}, sequential: {sequential}, ignore: [{ignore}]}}",
            algorithm="gptq, sequential: true",
            exports="{format: gguf, type: Q8_0}",
        )
        + "refine: {method: sequential_ls}\n"
    )
    with started(recipe, out, [], False, None) as job:
        model = ModelUnderWork(job)
        compressed = run_compression(job, model)
        (folder,) = quantize_exports(job, model, compressed).folders.values()
        packed = PackedFolder.open(folder)
        refined = Checkpoint.open(compressed.checkpoint)
    leader, *others = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert all((name in refined.low_rank) != dense for name in (leader, *others))
    for linear in (leader, *others):
        written, wanted = (
            values(f"{linear}.weight")
            if dense
            else values(f"{linear}.lr_b.weight") @ values(f"{leader}.lr_a.weight")
            for values in (
                lambda name: packed_values(packed, name, refined.tensor(name).shape[1]),
                lambda name: refined.tensor(name).numpy(),
            )
        )
        assert np.linalg.norm(written - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["type_a", "type_b"])
def test_a_factor_that_stays_float_is_of_the_same_pair_as_the_other(place: Path, key: str) -> None:
    (file,), work = exported(
        place,
        key,
        compress=f"{PAIRS[:-1]}, sequential: true}}",
        algorithm="gptq, sequential: true",
        exports=f"{{format: gguf, type: Q8_0, {key}: F16}}",
    )
    checkpoint = Checkpoint.open(work / "checkpoint")
    gguf: Any = exporter("gguf")
    read = dict(gguf.read_back(file, checkpoint, place / "model", None, work / "base"))
    for name in checkpoint.low_rank:
        pair = checkpoint.pair(name)
        leader = checkpoint.low_rank[name].group
        found = read[f"{name}.lr_b.weight"] @ read[f"{leader}.lr_a.weight"]
        wanted = pair.dense().numpy()
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_a_file_that_quantize_leaves_alone_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Reporter, "note", lambda _, text: notes.append(text))
    exported(
        place,
        "notes",
        compress=PAIRS,
        algorithm="rtn",
        exports="{format: gguf, type: Q4_0}, {format: gguf, type: Q4_0, form: stock_lora}",
    )
    named = [note for note in notes if "not by quantize" in note]
    assert named == [
        "model-Q4_0-stock-lora.gguf: base and adapter by llama.cpp's quantiser, not by quantize"
    ]


def last_hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, output_hidden_states=True).hidden_states[-1]
    return found


def test_a_budget_belongs_to_compression(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for compress, word in (
        ("{method: none, budget: {param_ratio: 0.8}}", "leave out budget"),
        ("{method: svd_llm}", "budget is missing"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(
            RECIPE.format(compress=compress, algorithm="gptq", exports="{format: gguf}")
        )
        with pytest.raises(RecipeError, match=word):
            load_recipe(path)
