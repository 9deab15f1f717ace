"""Streamed weights, activations in a file, checkpoints written one tensor at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.core import machine
from svdexport.errors import InputError, RecipeError
from svdexport.export.safetensors_write import SafetensorsWriter
from svdexport.models.activations import Activations
from svdexport.models.blocks import discover, record_inputs, run_block, tail_gradients
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.loader import load_model, structure_of
from svdexport.models.weights import StreamedWeights, as_weights
from svdexport.pipeline.job import decide_memory
from tests.unit import gguf_models
from tests.unit.tiny_checkpoints import compress, make_model

FAMILIES = ["llama", "llama-tied", "llama-bias", "mistral-window", "qwen3", "gemma2", "gpt2"]
RECIPE = """\
schema: 1
model: {path: m}
calibration: {source: file, file: text.txt, samples: 6, length: 24, batch: 4}
compress: {budget: {param_ratio: 0.7}, rank_multiple: 8}
export: [{format: checkpoint}]
evaluate: {text: text.txt, context: 24, windows: 2}
speed: {threads: 1}
"""
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_weights_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    make_model(tmp_path, family)
    loaded = load_model(tmp_path)
    structure = discover(loaded)
    weights = StreamedWeights(tmp_path, structure.blocks)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with weights.ends() as model:
        recorded = record_inputs(model, structure, tokens)
    expected = record_inputs(loaded, structure, tokens)
    hidden = expected.hidden
    assert torch.equal(recorded.hidden, hidden)
    for index, path in enumerate(structure.blocks):
        with weights.block(path) as block:
            found = run_block(block, hidden, recorded.calls[index])
        hidden = run_block(loaded.get_submodule(path), hidden, expected.calls[index])
        assert torch.equal(found, hidden)
    with weights.ends() as model:
        (gradient,) = tail_gradients(model, structure, tokens, hidden)
    assert torch.equal(gradient, tail_gradients(loaded, structure, tokens, hidden)[0])
    for linear in structure.linears():
        assert torch.equal(weights.linear(linear.name), as_weights(loaded).linear(linear.name))
    assert all(parameter.is_meta for parameter in weights.model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_streamed_model_can_be_called_as_a_whole(family: str, tmp_path: Path) -> None:
    make_model(tmp_path / "m", family)
    groups = {"gpt2": [["mlp.c_fc"]]}.get(family, [["mlp.gate_proj", "mlp.up_proj"]])
    compress(tmp_path / "m", tmp_path / "c", groups, rank=8)
    linears = list(structure_of(tmp_path / "m").linears())
    tokens = torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(1))
    for folder in (tmp_path / "m", tmp_path / "c"):
        loaded = load_model(folder)
        values = {
            name: torch.randn_like(parameter)
            for name, parameter in loaded.named_parameters()
            if ".1.mlp" in name or "lm_head" in name
        }
        save_file(values, tmp_path / "values")
        for given in (None, tmp_path / "values"):
            if given is not None:
                loaded.load_state_dict(values, strict=False)
            weights = StreamedWeights(folder, (), False, given)
            for linear in linears:
                found = as_weights(loaded).linear(linear.name)
                assert torch.equal(weights.linear(linear.name), found)
            with torch.no_grad(), weights.on_call() as model:
                found = model(tokens).logits
                assert all(parameter.is_meta for parameter in model.parameters())
                assert torch.equal(found, loaded(tokens).logits)


def test_only_what_is_used_is_in_memory(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    structure = structure_of(tmp_path)
    weights = StreamedWeights(tmp_path, structure.blocks)

    def present() -> set[str]:
        return {name for name, p in weights.model.named_parameters() if not p.is_meta}

    with weights.block(structure.blocks[1]):
        assert present()
        assert all(name.startswith("model.layers.1.") for name in present())
    with weights.ends() as model:
        record_inputs(model, structure, torch.zeros((1, 4), dtype=torch.long))
        assert present() == {"model.embed_tokens.weight"}  # the head was not reached
    assert present() == set()


def test_a_tensor_of_another_shape_or_name_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    structure = structure_of(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    short = tensors | {name: tensors[name][:-1].contiguous()}
    save_file(short, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = StreamedWeights(tmp_path, structure.blocks)
    with pytest.raises(InputError, match=name), weights.block(structure.blocks[1]):
        pass
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        StreamedWeights(tmp_path, structure.blocks)


def moments_of(found: BlockMoments) -> dict[str, Tensor]:
    named = {**{f"h {k}": v for k, v in found.inputs.items()}}
    named |= {f"g {k}": v for k, v in found.gradients.items()}
    named |= {f"s {k}": v for k, v in found.sampled_gradients.items()}
    return {name: moment.matrix for name, moment in named.items()}


def test_skipped_blocks_change_no_other(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama", num_hidden_layers=4)
    structure = structure_of(tmp_path / "m")
    tokens = torch.randint(0, 300, (5, 12), generator=torch.Generator().manual_seed(1))
    every = ["inputs", "gradients", "sampled_gradients", "fisher", "mean_abs", "similarity"]
    for statistics in (["inputs"], every):
        settings = {"batch": 2, "statistics": statistics, "scratch": tmp_path}
        whole = {m.block: moments_of(m) for m in calibrate(model, structure, tokens, **settings)}
        assert sorted(whole) == [0, 1, 2, 3]
        part = list(calibrate(model, structure, tokens, skip=(0, 2), **settings))
        assert sorted(m.block for m in part) == [1, 3]
        for found in part:
            for name, matrix in moments_of(found).items():
                assert torch.equal(matrix, whole[found.block][name])
        assert list(calibrate(model, structure, tokens, skip=range(4), **settings)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_activations_come_back_from_the_file(tmp_path: Path) -> None:
    store = Activations(tmp_path / "a.bin", 5, 3, 4)
    hidden = torch.randn(3, 5, 3, 4)
    for boundary in (2, 0, 1):
        for part in (slice(3, 6), slice(0, 3)):
            store.put(boundary, part, hidden[boundary, part])
    assert torch.equal(store.get(1, slice(3, 6), 2), hidden[1, 3:])
    assert torch.equal(store.get(2, slice(0, 3), 3), hidden[2, :3])
    store.close()
    assert list(tmp_path.iterdir()) == []


def checkpoint_bytes(folder: Path, name: str, *more: str) -> dict[str, bytes]:
    found = api.compress(folder / "r.yaml", folder / name, list(more))
    return {path.name: path.read_bytes() for path in sorted(found.iterdir())}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "m", "llama-tied")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize(
    "how",
    [
        *(f"method={name}" for name in ("svd", "svd_llm", "kfac_svd", "tfwsvd", "basis_sharing")),
        "settings.labels=both",
    ],
)
def test_streaming_gives_the_same_bytes(place: Path, how: str) -> None:
    how = f"compress.{how}"
    loaded = checkpoint_bytes(place, "a", how, "compress.stream=never")
    streamed = checkpoint_bytes(place, "b", how, "compress.stream=always")
    assert streamed == loaded
    assert "streamed from the disk" in (place / ".b.work" / "memory.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sequential", ["false", "true"])
def test_streaming_gives_the_same_quantised_files(tmp_path: Path, sequential: str) -> None:
    """Pairs, products of pairs, and dense linears that were fitted to what came before them."""
    gguf_models.make_model(tmp_path / "m", "Llama")
    (tmp_path / "text.txt").write_text(TEXT)
    exports = "[{format: gguf, type: Q4_0}, {format: gguf, type: Q4_0, form: stock}]"
    recipe = RECIPE.replace("[{format: checkpoint}]", exports)
    quantize = f"quantize: {{algorithm: gptq, sequential: {sequential}}}\n"
    (tmp_path / "r.yaml").write_text(recipe + quantize)
    found = []
    for stream in ("never", "always"):
        how = ["compress.sequential=true", f"compress.stream={stream}"]
        files = api.export(tmp_path / "r.yaml", tmp_path / stream, how)
        found.append({file.name: file.read_bytes() for file in files})
    checkpoint = Checkpoint.open(tmp_path / ".always.work" / "checkpoint")
    linears = structure_of(tmp_path / "m").linears()
    assert 0 < len(checkpoint.low_rank) < len(list(linears))
    assert len(found[0]) == 2 and found[0] == found[1]


def test_finished_blocks_are_kept(place: Path) -> None:
    expected = checkpoint_bytes(place, "a", "compress.stream=always")
    work = place / ".a.work"
    for path in (work / "stages" / "factors.json", work / "stages" / "checkpoint.json"):
        path.unlink()
    first, second = sorted((work / "factors").glob("block_*"))
    second.unlink()
    kept = first.stat()
    assert checkpoint_bytes(place, "a", "compress.stream=always") == expected
    assert second.exists()
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_factors_of_other_inputs_are_not_kept(place: Path) -> None:
    made = checkpoint_bytes(place, "a")
    work = place / ".a.work"
    for stage in ("factors", "checkpoint"):
        (work / "stages" / f"{stage}.json").unlink()
    (work / "factors" / "key").write_text("another")
    first = work / "factors" / "block_0000.safetensors"
    expected = first.read_bytes()
    first.write_bytes(b"old")
    assert checkpoint_bytes(place, "a") == made
    assert first.read_bytes() == expected


def test_a_streamed_model_does_not_write_the_text_itself(place: Path) -> None:
    own = ["calibration.source=self", "calibration.file=null", "compress.stream=always"]
    with pytest.raises(RecipeError, match=r"calibration.*calibration\.source: file"):
        api.compress(place / "r.yaml", place / "a", own)


WHOLE = {
    "compress.budget.bytes": (
        {"budget": {"bytes": "300KB"}}, {"algorithm": "gptq"}, {"format": "gguf", "type": "mixed"}
    ),
    "compress.allocate: asvd": ({"method": "asvd", "allocate": "asvd"}, None, None),
    "quantize.tune": ({}, {"tune": {"steps": 2}}, {"format": "gguf", "type": "Q8_0"}),
}  # fmt: skip


@pytest.mark.parametrize("named", WHOLE)
def test_what_needs_all_weights_is_refused_before_anything_is_done(place: Path, named: str) -> None:
    recipe = yaml.safe_load(RECIPE)
    compress, quantize, export = WHOLE[named]
    recipe["compress"] |= {**compress, "stream": "always"}  # type: ignore[dict-item]
    recipe["quantize"] = quantize
    recipe["export"] = [export] if export else recipe["export"]
    (place / "r.yaml").write_text(yaml.safe_dump(recipe))
    for call in (lambda: api.compress(place / "r.yaml", place / "a"),
                 lambda: api.plan(place / "r.yaml")):  # fmt: skip
        with pytest.raises(RecipeError, match=rf"^{named}.*compress\.stream: always"):
            call()
    assert not (place / ".a.work" / "tokens.safetensors").exists()


def test_when_weights_are_streamed() -> None:
    assert not decide_memory("auto", 10, 20).streamed
    assert decide_memory("auto", 11, 20).streamed
    assert decide_memory("always", 1, 20).streamed
    assert not decide_memory("never", 100, 20).streamed
    assert "16.0 GB of memory free" in decide_memory("auto", 11, 16 * 10**9).note


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_s_free_memory_holds_the_cache_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, limit: str, used: str, cached: str
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=60))
    assert machine.free_memory() == 60
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text("24\n")
    (tmp_path / folder / used).write_text("15\n")
    assert machine.free_memory() == 9
    (tmp_path / folder / "memory.stat").write_text(f"anon 1\n{cached} 14\nactive_file 0\n")
    assert machine.free_memory() == 23
    (tmp_path / folder / limit).write_text("max\n")
    assert machine.free_memory() == 60


def test_the_writer_writes_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    tensors = {
        f"{name}.{i}": torch.ones(2, 3).to(dtype)
        for i, dtype in enumerate(dtypes)
        for name in ("b", 'a"é', "c")
    }
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5), "t": torch.randn(4, 3).T}
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(dense, tmp_path / "expected", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path / "written") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex"), SafetensorsWriter(tmp_path / "w") as writer:
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3, dtype=torch.complex64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("statistics", [["inputs"], ["inputs", "gradients"]])
def test_one_block_s_moments_are_in_memory_at_a_time(tmp_path: Path, statistics: Any) -> None:
    model = make_model(tmp_path / "m", "llama", num_hidden_layers=3)
    tokens = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    before: list[weakref.ref[Any]] = []
    kept: list[bool] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "calibrate" and before:
            kept.append(before[-1]() is not None)

    for moments in calibrate(
        model, structure_of(tmp_path / "m"), tokens, batch=2, statistics=statistics,
        scratch=tmp_path, progress=progress,
    ):  # fmt: skip
        before.append(weakref.ref(next(iter(moments.inputs.values()))))
        del moments
    assert len(before) == 3 and kept == [False, False]
