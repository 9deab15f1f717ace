"""`plan` reads no weights, and its bytes are those of the exported tensors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from svdexport import api
from svdexport.allocate import uniform
from svdexport.checkpoint import SLOTS, Checkpoint
from svdexport.errors import InputError, RecipeError
from svdexport.export import ExportRequest, exporter, gguf_base
from svdexport.models.blocks import InputGroup, Linear, Structure
from svdexport.models.shapes import shapes_of
from svdexport.pipeline.compress import allocate_ranks, candidate
from svdexport.pipeline.factor_files import factors_file, save_factors
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.preflight import check_inputs, positions
from svdexport.pipeline.sizes import weight_bytes
from svdexport.recipe import (
    CheckpointExport,
    Export,
    GgufExport,
    OnnxExport,
    Recipe,
    load_recipe,
)
from svdexport.safety import check_model_folder
from tests.unit.gguf_models import make_model
from tests.unit.tiny_checkpoints import make_model as make_tiny

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 2, length: 16}
evaluate: {context: 16, windows: 1}
compress: {method: svd, budget: {param_ratio: 0.6}, allocate: uniform, rank_multiple: 16}
export: [{format: gguf, type: Q8_0}, {format: onnx, precision: int4}, {format: checkpoint}]
"""
LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def recipe_of(folder: Path, text: str = RECIPE) -> tuple[Path, Recipe]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path, load_recipe(path)


def exporting(*specs: Export) -> str:
    """The recipe with other exports."""
    given = [
        {"format": spec.format} | spec.model_dump(mode="json", exclude_defaults=True)
        for spec in specs
    ]
    lines = RECIPE.splitlines()
    return "\n".join([*lines[:-1], f"export: {json.dumps(given)}"]) + "\n"


Q8_ONLY = exporting(GgufExport(type="Q8_0"))


def test_types_of_matrices_are_places_in_the_block(tmp_path: Path) -> None:
    """Losses that are alike in every block give every block one ratio, whatever the names."""
    losses = {"attn.c_proj": 30.0, "mlp.c_proj": 3000.0, "experts.0.up": 50.0, "shared.up": 10.0}
    groups = []
    for block in range(2):
        energies: dict[str, torch.Tensor] = {}
        for name, loss in losses.items():
            whole = f"h.{block}.{name}"
            stack = f"h.{block}.experts.up" if "experts" in name else None
            groups.append(InputGroup(block, (Linear(whole, 64, 64, False, stack),)))
            energies |= {f"{whole}.energies": torch.full((64,), loss)}
            energies |= {f"{whole}.errors": torch.zeros(64)}
        save_factors(energies, factors_file(tmp_path, block))
    text = RECIPE.replace("uniform, rank_multiple: 16", "svd_llm_v2, rank_multiple: 1")
    structure = Structure(("h.0", "h.1"), tuple(groups), False)
    plan = allocate_ranks(recipe_of(tmp_path, text)[1], structure, tmp_path)
    ranks = {entry.group.leader: entry.allocation.rank for entry in plan}
    assert len(ranks) == 8
    assert set(ranks.values()) == {round(0.6 * 64 * 64 / 128)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and its uniform plan as a checkpoint, as a run would make it."""
    folder = tmp_path_factory.mktemp("plan")
    make_model(folder / "model", "Llama", hidden_size=128, intermediate_size=160)
    api.compress(recipe_of(folder)[0], folder / "out")
    return folder


@pytest.mark.parametrize(
    "spec",
    [
        GgufExport(type="Q8_0"),
        GgufExport(type="Q4_K", type_b="F16"),
        GgufExport(type="Q8_0", form="stock_lora"),
        OnnxExport(precision="fp32"),
        OnnxExport(precision="fp16"),
        OnnxExport(precision="int2", block_size=128),
        OnnxExport(precision="int4", block_size=64),
        CheckpointExport(dtype="float16"),
    ],
    ids=lambda spec: f"{spec.format}-{getattr(spec, 'label', '')}{getattr(spec, 'precision', '')}",
)
def test_bytes_are_those_of_the_exported_tensors(place: Path, tmp_path: Path, spec: Export) -> None:
    _, recipe = recipe_of(place)
    shapes = shapes_of(place / "model")
    groups = chosen_groups(recipe, shapes.structure)
    budget = recipe.compress
    chosen = uniform.allocate(
        [candidate(g) for g in groups], budget.budget.param_ratio, budget.rank_multiple
    )
    assert any(choice.rank for choice in chosen.values())
    checkpoint = Checkpoint.open(place / ".out.work" / "checkpoint")
    (entry,) = api.plan(recipe_of(place, exporting(spec))[0])["exports"]
    (place / "work").mkdir(exist_ok=True)  # of all: the model is converted to GGUF once
    for name, source in (("pairs", checkpoint), ("dense", Checkpoint.open(place / "model"))):
        suffix = ".gguf" if spec.format == "gguf" else ""
        request = ExportRequest(
            source, place / "model", None, tmp_path / f"{name}-out{suffix}", place / "work", spec,
        )  # fmt: skip
        made = exporter(spec.format).export(request)
        written = sum(record.nbytes for record in made.tensors.values())
        if name == "pairs":
            foretold = weight_bytes(spec, shapes, groups, chosen, "float32")
        else:
            foretold = weight_bytes(spec, shapes, [], {}, "float32")
        assert foretold == written
        assert entry["note"].startswith("exact") != isinstance(spec, CheckpointExport)
        if not isinstance(spec, CheckpointExport):
            assert made.bytes == entry["file_bytes" if name == "pairs" else "dense_file_bytes"]


def test_bytes_of_a_remapped_checkpoint_are_those_of_its_slots(place: Path, tmp_path: Path) -> None:
    _, recipe = recipe_of(place)
    shapes = shapes_of(place / "model")
    groups = chosen_groups(recipe, shapes.structure)
    chosen = uniform.allocate([candidate(g) for g in groups], 0.6, 16)
    spec = CheckpointExport(dtype="float16", layout="remapped")
    checkpoint = Checkpoint.open(place / ".out.work" / "checkpoint")
    request = ExportRequest(checkpoint, place / "model", None, tmp_path / "out", tmp_path, spec)
    written = exporter("checkpoint").export(request).tensors
    assert any(name.endswith(SLOTS) for name in written)
    held = sum(record.nbytes for record in written.values())
    assert weight_bytes(spec, shapes, groups, chosen, "float32") == held


@pytest.mark.parametrize("model", ["Qwen2", "Gemma3"])
def test_the_gguf_of_a_run_has_the_planned_size(tmp_path: Path, model: str) -> None:
    """Biases, a tied embedding, and norms of other kinds."""
    make_model(tmp_path / "model", model, torch.bfloat16, hidden_size=128, intermediate_size=160)
    path, _ = recipe_of(tmp_path, Q8_ONLY)
    (entry,) = api.plan(path)["exports"]
    (file,) = api.export(path, tmp_path / "out")
    assert entry["note"] == "exact", entry
    assert entry["file_bytes"] == file.stat().st_size
    for weights in (tmp_path / "model").glob("*.safetensors"):  # names, shapes and tokens do
        weights.unlink()
    assert api.plan(path)["exports"] == [entry]


@pytest.mark.parametrize(
    ("model", "dtype", "tied"),
    [("Qwen2", torch.bfloat16, True), ("Llama", torch.float16, False)],
)
def test_the_onnx_folder_of_a_run_has_the_planned_size(
    tmp_path: Path, model: str, dtype: torch.dtype, tied: bool
) -> None:
    """Biases and a tied embedding; an embedding apart that float16 holds."""
    sizes = {"hidden_size": 128, "intermediate_size": 160, "tie_word_embeddings": tied}
    make_model(tmp_path / "model", model, dtype, **sizes)
    path, _ = recipe_of(tmp_path, exporting(OnnxExport(precision="int8"), OnnxExport()))
    entries = api.plan(path)["exports"]
    for weights in (tmp_path / "model").glob("*.safetensors"):  # values are not needed
        weights.rename(weights.with_suffix(".away"))
    assert api.plan(path)["exports"] == entries
    for weights in (tmp_path / "model").glob("*.away"):
        weights.rename(weights.with_suffix(".safetensors"))
    for entry, folder in zip(entries, api.export(path, tmp_path / "out"), strict=True):
        assert "both graphs and their data" in entry["note"]
        assert "embedding" not in entry["note"]
        files = ("model.onnx", "model_last.onnx", "model.onnx.data")
        assert entry["file_bytes"] == sum((folder / name).stat().st_size for name in files)


def test_without_a_method_all_is_planned_dense(place: Path, tmp_path: Path) -> None:
    text = Q8_ONLY.replace("{path: model}", f"{{path: {place / 'model'}}}")
    lines = [line for line in text.splitlines() if not line.startswith("compress")]
    path, _ = recipe_of(tmp_path, "\n".join([*lines, "compress: {method: none}"]) + "\n")
    found = api.plan(path)
    assert {row["rank"] for row in found["groups"]} == {None}
    assert found["kept"] == 1.0 and found["ranks"] == "no"
    (file,) = found["exports"]
    assert file["file_bytes"] == file["dense_file_bytes"] is not None


def test_a_graph_that_the_builder_does_not_make_is_not_called_exact(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=160)
    spec = OnnxExport(precision="int8", operators="standard")
    (entry,) = api.plan(recipe_of(tmp_path, exporting(spec))[0])["exports"]
    assert entry["file_bytes"] is None and "graph by torch.onnx" in entry["note"]


def test_a_gguf_is_planned_from_its_header(tmp_path: Path) -> None:
    make_model(tmp_path / "made", "Llama", hidden_size=128, intermediate_size=160)
    gguf_base.convert(tmp_path / "made", tmp_path / "model.gguf", "f16")
    path, _ = recipe_of(tmp_path, Q8_ONLY.replace("path: model", "gguf: model.gguf"))
    (entry,) = api.plan(path)["exports"]
    # sixteen tokens are too few for parity to judge the agreement of a random model
    (written,) = api.export(path, tmp_path / "out", ["evaluate.windows=8"])
    assert entry["file_bytes"] == written.stat().st_size


def test_without_a_tokenizer_the_plan_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    gguf, onnx, checkpoint = api.plan(recipe_of(tmp_path)[0], ["compress.rank_multiple=32"])[
        "exports"
    ]
    assert gguf["file_bytes"] is None and "no tokenizer" in gguf["note"]
    assert "headers" in checkpoint["note"]
    assert "if float16 holds each of its values" in onnx["note"]


def test_a_70b_configuration_is_planned_within_five_seconds(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    path, _ = recipe_of(tmp_path)
    began = time.process_time()
    found = api.plan(path, ["compress.rank_multiple=32"])  # whole blocks of Q8_0
    assert time.process_time() - began < 5
    assert found["params_model"] == 70_553_706_496
    assert len(found["groups"]) == 80 * 4
    gguf = found["exports"][0]
    assert 70.5e9 < gguf["dense_weight_bytes"] < 75.1e9
    assert 0.6 < gguf["weight_bytes"] / gguf["dense_weight_bytes"] < 0.62  # the rest stays dense
    assert found["memory_bytes"]["weights"] == 4 * found["params_model"]
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00030.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert api.plan(path, ["compress.rank_multiple=32"])["params"] == found["params"]


def test_both_labels_are_planned_with_their_own_moments_and_boundary(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    path, _ = recipe_of(tmp_path)
    text, both = (
        api.plan(path, ["compress.method=kfac_svd", f"compress.settings.labels={labels}"])
        for labels in ("text", "both")
    )
    outputs = sum(m**2 for m in (8192, 1024, 1024, 8192, 28672, 28672, 8192))
    more = {k: both["memory_bytes"][k] - v for k, v in text["memory_bytes"].items()}
    assert more["moments_of_a_block"] == 8 * outputs
    assert more["activations"] * 81 == text["memory_bytes"]["activations"]
    assert more["weights"] == 0


def test_a_configuration_alone_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    code = LLAMA_70B | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(code))
    with pytest.raises(InputError, match="trust_remote_code"):
        api.plan(recipe_of(tmp_path)[0])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_lengths_end_where_learned_positions_do(family: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "model", family)  # 128 positions
    path, _ = recipe_of(tmp_path)
    fits = ["speed.prefill=[16,128]", "calibration.length=128", "evaluate.context=128"]
    check_inputs(load_recipe(path, fits))
    for key, value in {
        "speed.prefill": "[16, 129]",
        "calibration.length": "129",
        "evaluate.context": "129",
    }.items():
        longer = load_recipe(path, [*fits, f"{key}={value}"])
        if family == "llama":  # rotary positions have no end
            check_inputs(longer)
            continue
        with pytest.raises(RecipeError, match=f"^{key}: 129 tokens.* at most 128"):
            check_inputs(longer)
    check_inputs(load_recipe(path, [*fits, "speed.prefill=[512]"]), timed=False)
    path.write_text(RECIPE[: RECIPE.index("export:")] + "export: [{format: checkpoint}]\n")
    check_inputs(load_recipe(path, [*fits, "speed.prefill=[512]"]))  # nothing is timed


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 62)])
def test_positions_of_encoders(kind: str, most: int, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert positions(check_model_folder(tmp_path)) == most
    model = AutoModel.from_pretrained(tmp_path)
    assert model(torch.full((1, most), 5)).last_hidden_state.shape[1] == most
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|must match"):
        model(torch.full((1, most + 1), 5))


def test_what_a_run_refuses_of_an_encoder_is_not_planned(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", hidden_size=64, num_attention_heads=2)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="an encoder writes no text"):
        api.plan(recipe_of(tmp_path)[0])


def test_types_that_cannot_hold_their_rows_are_foretold(place: Path) -> None:
    path, _ = recipe_of(place)
    other = place / "q4_k.yaml"
    asked = path.read_text().replace("type: Q8_0", "type: Q4_K, type_b: F16")
    other.write_text(asked)
    found = api.plan(other)
    lines = "\n".join(found["exports"][0]["other_types"])
    assert "first factors of type Q5_0 instead of Q4_K" in lines  # rows of 128 and of 160
    assert "second factors" not in lines
    fitting = api.plan(path, ["compress.rank_multiple=32"])["exports"]
    assert [item["other_types"] for item in fitting] == [[], [], []]
