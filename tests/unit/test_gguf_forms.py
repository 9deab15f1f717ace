"""All weight types, forms for a stock llama.cpp, and a GGUF as the input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.core.measures import Parity
from svdexport.core.noise import relative_noise
from svdexport.errors import InputError
from svdexport.export import gguf
from svdexport.export.base import Exported
from svdexport.models.loader import load_model, open_source
from svdexport.pipeline.artifacts import load_values
from svdexport.recipe import GgufExport, Model
from svdexport.recipe.exports import GgufType
from svdexport.runtimes.artifact import size_bytes
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import GgufFile, adapter_path
from svdexport.runtimes.inspect_gguf import inspect
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from svdexport.verify import parity
from tests.unit.gguf_models import (
    WORDS,
    compress,
    export,
    load,
    make_model,
    torch_logits,
    work_of,
)

TOKENS = np.random.default_rng(0).integers(3, 259, 40)
WIDTH = 256  # rows that every type can hold


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """Source, checkpoint with pairs of rank 256, logits of the torch model with B A."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_key_value_heads": 4}
    source = make_model(root / "source", "Llama", **sizes)  # q, k, v wide enough to share an A
    checkpoint, reference = compress(source, root / "small", rank=256)
    return source, checkpoint, torch_logits(reference, TOKENS)


def logits_of(path: Path) -> np.ndarray:
    runtime = LlamaCppRuntime(path, threads=1, context=64, exact=True)
    found = runtime.logits(TOKENS)
    runtime.close()
    return found


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())


def values_of(made: Exported, checkpoint: Path, source: Path) -> dict[str, np.ndarray]:
    """What gguf-py reads in the file, by the checkpoint's names."""
    opened = Checkpoint.open(checkpoint)
    return dict(gguf.read_back(made.path, opened, source, None, work_of(source)))


def parity_with_own_values(made: Exported, checkpoint: Path, source: Path) -> Parity:
    """llama.cpp's logits against those of torch with the values that the file holds."""
    reference = load_model(checkpoint)
    load_values(reference, values_of(made, checkpoint, source).items())
    rounds, rounded = parity.rounding("gguf", made.type), None
    if rounds is not None:
        with parity.rounded_activations(reference, rounds):
            rounded = torch_logits(reference, TOKENS)
    limits, meant = parity.tolerance("gguf", made.type), torch_logits(reference, TOKENS)
    return parity.compare(meant, logits_of(made.path), limits, rounded)


def assert_values_are_near(made: Exported, checkpoint: Path, source: Path, type_name: str) -> None:
    """Every matrix of the file is its own of the checkpoint, as near as the type allows."""
    opened = Checkpoint.open(checkpoint)
    found = values_of(made, checkpoint, source)
    assert set(found) == {name for name in opened.names() if opened.tensor(name).ndim <= 2}
    exact = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
    for name, values in found.items():
        own = opened.tensor(name).float().numpy()
        if own.ndim == 1:
            assert np.array_equal(values, own), name
            continue
        # ggml, without importance, makes up to 27 % more noise than what its grid allows (Q2_K)
        limit = exact.get(type_name)
        if limit is None:
            limit = (1.4 * relative_noise(type_name)) ** 0.5
        assert np.linalg.norm(values - own) <= limit * np.linalg.norm(own), name


@pytest.mark.parametrize("type_name", get_args(GgufType))
def test_every_type_runs_and_reads_back(
    type_name: str, model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    source, checkpoint, expected = model
    made = export(checkpoint, source, tmp_path / "out.gguf", type=type_name)
    assert made.notes == ()
    factors = {r.type for name, r in made.tensors.items() if ".lr_" in name}
    assert factors == {type_name}
    assert gguf.check_round_trip(made.path, made.tensors) == []
    assert_values_are_near(made, checkpoint, source, type_name)
    got = parity_with_own_values(made, checkpoint, source)
    assert got.passed, got.problems
    # measured on this model: the error halves with every bit; below 6 bits it is none
    bits = 8 * next(r.nbytes / np.prod(r.shape) for n, r in made.tensors.items() if ".lr_a" in n)
    limits = {"F32": 1e-4, "F16": 5e-3, "BF16": 0.04}
    limit = limits.get(type_name, 40 / 2**bits)
    assert limit > 0.7 or relative(logits_of(made.path), expected) < limit


def test_each_part_gets_its_own_type(model: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    source, checkpoint, expected = model
    made = export(
        checkpoint,
        source,
        tmp_path / "out.gguf",
        type="Q4_0",
        type_a="Q8_0",
        type_b="Q6_K",
        embedding_type="F16",
        head_type="Q5_K",
    )
    types = {name: record.type for name, record in made.tensors.items()}
    assert types["blk.0.attn_qkv.lr_a.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_up.lr_a.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.lr_b.weight"] == "Q6_K"
    assert (types["token_embd.weight"], types["output.weight"]) == ("F16", "Q5_K")
    assert made.type == "Q4_0-a-Q8_0-b-Q6_K-embedding-F16-head-Q5_K"
    assert relative(logits_of(made.path), expected) < 0.3
    got = parity_with_own_values(made, checkpoint, source)
    assert got.passed, got.problems


def test_a_rank_that_a_type_cannot_hold_is_reported(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "Llama", hidden_size=WIDTH)
    checkpoint, _ = compress(source, tmp_path / "small", rank=40)
    made = export(checkpoint, source, tmp_path / "out.gguf", type="Q4_K")
    types = {name: record.type for name, record in made.tensors.items()}
    assert types["blk.0.attn_qkv.lr_b.weight"] == "F16"  # 40 is no multiple of 32
    assert types["blk.0.ffn_down.lr_a.weight"] == "Q5_0"  # rows of 96: llama.cpp's own fallback
    assert types["blk.0.attn_qkv.lr_a.weight"] == "Q4_K"
    notes = "\n".join(made.notes)
    assert "blk.N.attn_qkv.lr_b.weight: 2 of type F16 instead of Q4_K" in notes
    assert "blk.N.ffn_down.lr_a.weight: 2 of type Q5_0 instead of Q4_K" in notes


def test_stock_form_is_a_plain_file_of_the_products(
    model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    source, checkpoint, expected = model
    made = export(checkpoint, source, tmp_path / "out.gguf", type="F32", form="stock")
    assert not any(".lr_" in name for name in made.tensors)
    assert inspect(made.path)["runtime"] == "llama.cpp"
    assert relative(logits_of(made.path), expected) < 1e-4
    opened = Checkpoint.open(checkpoint)
    found = dict(gguf.read_back(made.path, opened, source, None, work_of(source)))
    name = "model.layers.1.self_attn.q_proj"
    assert np.allclose(found[f"{name}.weight"], opened.pair(name).dense().numpy(), atol=1e-6)


@pytest.mark.parametrize("type_name", ["F32", "Q4_0"])
def test_stock_lora_form_adds_the_pairs_to_the_remainder(
    type_name: str, model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    source, checkpoint, _ = model
    spec = {"type": type_name, "type_a": "F16", "type_b": "F16", "form": "stock_lora"}
    made = export(checkpoint, source, tmp_path / "out.gguf", **spec)
    adapter = tmp_path / "out.lora.gguf"
    assert made.bytes == made.path.stat().st_size + adapter.stat().st_size
    assert inspect(adapter)["runtime"].endswith("beside its base model")
    found = inspect(made.path)
    assert found["runtime"] == "llama.cpp with --lora out.lora.gguf"
    assert found["totals"]["bytes"] == size_bytes(made.path) == made.bytes
    forms = {entry["form"] for entry in found["linears"]}
    assert "residual lora pair" in forms and forms <= {"residual lora pair", "dense"}
    alone = inspect(adapter)["totals"]
    assert found["totals"]["pairs"] == alone["pairs"] > 0
    assert found["totals"]["tensors"] == len(made.tensors) > alone["tensors"]
    assert gguf.check_round_trip(made.path, made.tensors) == []
    dense = export(source, source, tmp_path / "dense.gguf", type="F32")
    plain = export(source, source, tmp_path / "plain.gguf", type=type_name)
    expected = logits_of(dense.path)
    error = relative(logits_of(made.path), expected)
    # the pairs hold most of W, so quantising the remainder costs less than quantising W
    assert error < (5e-3 if type_name == "F32" else relative(logits_of(plain.path), expected))


RECIPE = """\
schema: 1
model: {{path: {root}/source}}
calibration: {{source: file, file: {root}/text.txt, samples: 8, length: 48, seed: 1}}
compress: {{method: svd_llm, budget: {{param_ratio: 0.4}}, rank_multiple: 8}}
export:
  - {{format: gguf, type: Q4_0, form: stock_lora, base: weight, type_a: F16, type_b: F16}}
evaluate: {{text: {root}/text.txt, context: 48, windows: 2}}
"""


def test_a_file_that_is_not_the_whole_model_is_refused_as_a_source(
    model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    """transformers would fill in random weights for the pairs', and say nothing."""
    source, checkpoint, _ = model
    pairs = export(checkpoint, source, tmp_path / "pairs.gguf", type="F16").path
    base = export(checkpoint, source, tmp_path / "base.gguf", type="F16", form="stock_lora").path
    for file, why in (
        (pairs, "holds low-rank pairs already"),
        (base, "base of a LoRA adapter"),
        (adapter_path(base), "is a LoRA adapter"),
    ):
        with pytest.raises(InputError, match=why):
            open_source(Model(gguf=file), tmp_path / "work")


def test_an_adapter_carries_what_quantising_the_base_loses(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "Llama")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS.split())) for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    (made,) = api.export(tmp_path / "recipe.yaml", tmp_path / "out")
    assert made.name == "model-Q4_0-a-F16-b-F16-stock-lora-weight.gguf"
    dense = next(tmp_path.rglob(f"dense/{made.name}"))
    base, twin, adapter = GgufFile(made), GgufFile(dense), GgufFile(adapter_path(made))
    for name in twin.tensors:  # the base is the quantised original
        assert np.array_equal(base.raw(name), twin.raw(name)), name
    exact = export(source, source, tmp_path / "exact.gguf", type="F32")
    weights = GgufFile(exact.path)
    moments = calibration_moments(source, tmp_path / "recipe.yaml")
    assert any(f"blk.1.{name}.weight.lora_a" in adapter.tensors for name in moments)
    for name, moment in moments.items():
        pair = [f"blk.1.{name}.weight.lora_{part}" for part in "ab"]
        if pair[0] not in adapter.tensors:
            continue
        error = weights.rows(f"blk.1.{name}.weight") - base.rows(f"blk.1.{name}.weight")
        a, b = (adapter.rows(tensor) for tensor in pair)
        root = np.linalg.cholesky(
            moment + 1e-6 * moment.trace() / len(moment) * np.eye(len(moment))
        )
        best = (np.linalg.svd(error @ root, compute_uv=False)[len(a) :] ** 2).sum()
        left = (((error - b @ a) @ root) ** 2).sum()
        assert best <= left * (1 + 1e-9) and left < 1.02 * best + 1e-6 * ((error @ root) ** 2).sum()
    expected = logits_of(exact.path)
    assert relative(logits_of(made), expected) < relative(logits_of(dense), expected)


def calibration_moments(source: Path, recipe: Path) -> dict[str, np.ndarray]:
    """H of block 1's gate and down, from the inputs that torch's own linears see."""
    from safetensors.torch import load_file

    model = load(source)
    tokens = load_file(next(recipe.parent.rglob("tokens.safetensors")))["calibration"]
    found: dict[str, np.ndarray] = {}
    for name, path in (("ffn_gate", "gate_proj"), ("ffn_down", "down_proj")):

        def note(_m: object, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            found[name] = rows.T @ rows

        model.get_submodule(f"model.layers.1.mlp.{path}").register_forward_pre_hook(note)
    with torch.no_grad():
        model(tokens)
    return found


def test_a_base_of_weights_needs_the_stages_of_a_run(
    model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    source, checkpoint, _ = model
    spec = {"type": "Q4_0", "form": "stock_lora", "base": "weight"}
    with pytest.raises(InputError, match="needs pairs that are fitted to it"):
        export(checkpoint, source, tmp_path / "out.gguf", **spec)
    with pytest.raises(ValueError, match="is for form: stock_lora only"):
        GgufExport(base="weight")


def test_importance_goes_to_a_b_and_dense_tensors(
    model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    """Each tensor's bytes are the quantiser's for the weights of its own input channels."""
    source = tmp_path / "source"
    shutil.copytree(model[0], source)
    checkpoint, _ = compress(source, tmp_path / "small", rank=256, only="mlp")
    mlp, attention = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.v_proj"
    rng = np.random.default_rng(1)
    weights = {
        f"{mlp}.inputs": rng.exponential(1, WIDTH).astype(np.float32),
        f"{mlp}.rank": rng.exponential(1, 300).astype(np.float32),
        f"{attention}.inputs": rng.exponential(1, WIDTH).astype(np.float32),
    }
    work_of(source).mkdir()
    save_file(weights, work_of(source) / "importance.safetensors")
    aware = GgufFile(export(checkpoint, source, tmp_path / "aware.gguf", type="Q4_K").path)
    plain = export(checkpoint, source, tmp_path / "plain.gguf", type="Q4_K", importance=False)
    opened = Checkpoint.open(checkpoint)
    places = {
        "blk.0.ffn_gate_up.lr_a": (f"{mlp}.lr_a.weight", f"{mlp}.inputs"),
        "blk.0.ffn_gate_up.lr_b": (f"{mlp}.lr_b.weight", f"{mlp}.rank"),
        "blk.0.attn_v": (f"{attention}.weight", f"{attention}.inputs"),
    }
    for stem, (name, key) in places.items():
        given = weights[key] / weights[key].mean()
        values = opened.tensor(name).numpy()
        if stem.endswith("gate_up.lr_b"):
            up = opened.tensor(name.replace("gate_proj", "up_proj")).numpy()
            values = np.concatenate([values, up])
        expected = quantize(values, "Q4_K", np.maximum(given[:256], 1e-4))
        assert np.array_equal(aware.raw(f"{stem}.weight"), expected), stem
        unaware = GgufFile(plain.path).raw(f"{stem}.weight")
        assert np.array_equal(unaware, quantize(values, "Q4_K")), stem
    assert plain.type == "Q4_K-plain"


@pytest.mark.parametrize("given", ["F16", "Q8_0", "Q4_K"])
def test_a_gguf_in_gives_a_gguf_out(
    given: str, model: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    """A person has only a GGUF: transformers makes a folder of it, and its own GGUF is the base."""
    from svdexport.models.loader import open_source
    from svdexport.recipe import Model

    source, _, _ = model
    theirs = export(source, source, tmp_path / "theirs.gguf", type=given).path
    opened = open_source(Model(gguf=theirs), tmp_path / "work")
    assert opened.gguf == theirs
    checkpoint, reference = compress(opened.folder, tmp_path / "small", rank=256, only="mlp")
    made = export(checkpoint, opened.folder, tmp_path / "out.gguf", source_gguf=theirs, type="F32")
    assert relative(logits_of(made.path), torch_logits(reference, TOKENS)) < 1e-3
    assert any("dense tensors of the given GGUF" in note for note in made.notes) == (given != "F16")
    base, ours = GgufFile(theirs), GgufFile(made.path)
    for key, entry in base.kv_bytes.items():
        assert key == "general.file_type" or ours.kv_bytes[key] == entry
