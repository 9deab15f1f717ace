"""Encoders: structure, calibration, and export with pooled output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModel

from svdexport import api
from svdexport.checkpoint import Checkpoint, is_encoder
from svdexport.errors import InputError, RecipeError
from svdexport.export.onnx import LAST_FILE, MODEL_FILE, check_round_trip
from svdexport.models.calibrate import calibrate
from svdexport.models.corpus import encoder_texts
from svdexport.models.loader import load_model, load_tokenizer, structure_of
from svdexport.pipeline.stages import check_encoder
from svdexport.recipe import Recipe
from svdexport.runtimes import open_runtime
from svdexport.runtimes.encoder_rt import EncoderRuntime
from svdexport.runtimes.sentence import SentenceEncoder, pooling_of
from svdexport.runtimes.torch_rt import TorchRuntime
from svdexport.verify import embeddings
from tests.unit.test_export_onnx import dequantised, relative, run_export, set_accuracy_level
from tests.unit.tiny_checkpoints import compress, save_tokenizer

GROUPS = [
    ["attention.self.query", "attention.self.key", "attention.self.value"],
    ["intermediate.dense"],
]


def make_encoder(folder: Path) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_structure_and_calibration(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    assert is_encoder(json.loads((tmp_path / "config.json").read_text()))
    structure = structure_of(tmp_path)
    assert len(structure.blocks) == 2
    names = [[m.name.split(".", 3)[3] for m in g.members] for g in structure.of_block(0)]
    assert GROUPS[0] in names
    model = load_model(tmp_path)
    tokens = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    found = list(
        calibrate(model, structure, tokens, batch=3, statistics={"inputs"}, scratch=tmp_path)
    )
    # The slow way: the last block's first input is what its layer before gave.
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[1].double()
    flat = hidden.flatten(0, 1)
    leader = structure.of_block(1)[0].leader
    moment = found[1].inputs[leader].matrix
    assert torch.allclose(moment, flat.T @ flat, rtol=1e-4, atol=1e-4 * float(moment.abs().max()))


def ask_for(folder: Path, pooling: str) -> None:
    """The pooling of a folder, as sentence-transformers writes it."""
    keys = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    (folder / "1_Pooling").mkdir()
    settings = {key: name == pooling for name, key in keys.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def slow_embeddings(hidden: np.ndarray, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Of hidden states (texts, T, width), text by text, over length 1."""
    kept = [rows[seen == 1] for rows, seen in zip(hidden, mask, strict=True)]
    pooled = np.stack([rows[0] if pooling == "cls" else rows.mean(axis=0) for rows in kept])
    found: np.ndarray = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_sentence_encoder_pools_as_its_folder_asks(pooling: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path)
    ask_for(tmp_path, pooling)
    assert pooling_of(tmp_path) == pooling
    tokens = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [2], [5]])).long()
    with torch.no_grad():
        hidden, found = SentenceEncoder(model, pooling_of(tmp_path))(tokens, mask)
        plain = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden, plain)
    expected = slow_embeddings(plain.double().numpy(), mask.numpy(), pooling)
    assert np.abs(found.numpy() - expected).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "pooling"), [("fp32", "mean"), ("fp32", "cls"), ("int8", "mean")]
)
def test_embeddings_are_those_of_the_formula(precision: str, pooling: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "onnx"
    model = make_encoder(source)
    ask_for(source, pooling)
    checkpoint = compress(source, tmp_path / "low", GROUPS)
    exported = run_export(source, checkpoint, out, precision)
    assert check_round_trip(out, exported.tensors) == []
    assert not (out / LAST_FILE).exists()
    dequantised(model, out, checkpoint, source)
    if precision == "int8":
        set_accuracy_level(out, 0)
        graph = onnx.load(str(out / MODEL_FILE), load_external_data=False).graph
        assert "GatherBlockQuantized" in {node.op_type for node in graph.node}
    tokens = np.random.default_rng(0).integers(3, 300, (4, 11))
    mask = np.stack([np.arange(11) < n for n in (11, 7, 3, 9)]).astype(np.int64)
    with torch.no_grad():
        hidden = (
            model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
            .last_hidden_state.double()
            .numpy()
        )
    pooled = slow_embeddings(hidden, mask, pooling)
    runtime = open_runtime(out, threads=1, context=64)
    assert isinstance(runtime, EncoderRuntime)
    found = runtime.embed(tokens, mask)
    assert np.abs(found - pooled).max() < 1e-5
    reference = TorchRuntime(source, 1, model)
    assert relative(runtime.logits(tokens[0]), reference.logits(tokens[0])) < 1e-4
    assert runtime.prefill(tokens[0]) > 0
    with pytest.raises(InputError, match=r"model\.onnx: 300 tokens do not fit .* context of 256"):
        runtime.logits(np.zeros(300, np.int64))
    with pytest.raises(InputError, match="generates no text"):
        runtime.generate([1], 2)
    runtime.close()


def test_a_checkpoint_loads_as_the_encoder_it_is(tmp_path: Path) -> None:
    make_encoder(tmp_path / "source")
    checkpoint = compress(tmp_path / "source", tmp_path / "low", GROUPS)
    model = load_model(checkpoint.path)
    assert type(model).__name__ == "BertModel"
    first = model.get_submodule("encoder.layer.0.intermediate.dense")
    assert first.rank == 32


def test_of_an_encoder_bench_times_prefill_alone(tmp_path: Path) -> None:
    make_encoder(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "low", GROUPS)
    run_export(tmp_path / "source", Checkpoint.open(tmp_path / "source"), tmp_path / "onnx", "fp32")
    paths = [tmp_path / name for name in ("source", "low", "onnx")]
    found = api.bench(paths, rounds=1, prefill=(16,), decode=4, threads=1)
    assert [a["runtime"] for a in found["artifacts"]] == ["torch", "torch", "onnxruntime"]
    for artifact in found["artifacts"]:
        assert [timing["metric"] for timing in artifact["timings"]] == ["prefill_16"]
        assert artifact["decode_speedup"] is None
    (tmp_path / "text.txt").write_text("some words\n" * 50)
    for path in paths:
        with pytest.raises(InputError, match="an encoder predicts no next token"):
            api.evaluate(path, tmp_path / "text.txt", context=16)


def test_other_poolings_are_refused(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert pooling_of(tmp_path) == "cls"
    file.write_text('{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(InputError, match="pooling_mode_max_tokens: only mean or cls"):
        pooling_of(tmp_path)


def test_stages_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "modules.json"

    def write(*names: str) -> None:
        stages = [{"type": f"sentence_transformers.models.{name}"} for name in names]
        file.write_text(json.dumps(stages))

    write("Transformer", "Pooling", "Normalize")
    assert pooling_of(tmp_path) == "mean"
    write("Transformer", "Pooling", "Dense", "Normalize")
    with pytest.raises(InputError, match=r"modules.json: the stage 'Dense' is not exported"):
        pooling_of(tmp_path)
    file.write_text("[1]")
    with pytest.raises(InputError, match=r"modules.json: not a list of stages"):
        pooling_of(tmp_path)


def _recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "model": {"path": "m"},
            "compress": {"method": "svd_llm", "budget": {"param_ratio": 0.8}},
            "export": [{"format": "onnx"}],
            **changes,
        },
        strict=False,
    )


def test_what_an_encoder_cannot_do_is_refused(tmp_path: Path) -> None:
    texts = {
        "calibration": {"source": "file", "file": "a.txt"},
        "evaluate": {"text": "b.txt"},
    }
    check_encoder(_recipe(**texts))
    loss = {"method": "kfac_svd", "budget": {"param_ratio": 0.8}}
    with pytest.raises(RecipeError, match=r"kfac_svd with .* needs a language model's loss"):
        check_encoder(_recipe(compress=loss, **texts))
    with pytest.raises(RecipeError, match="not as gguf"):
        check_encoder(_recipe(export=[{"format": "gguf"}], **texts))
    with pytest.raises(RecipeError, match="an encoder writes no text"):
        check_encoder(_recipe(calibration=texts["calibration"]))
    with pytest.raises(RecipeError, match=r"gates.max_mean_kld: there for only a language model"):
        check_encoder(_recipe(gates={"max_mean_kld": 0.3}, **texts))


def test_figures_of_embeddings_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    meant = rng.standard_normal((12, 6))
    found = meant + 0.3 * rng.standard_normal((12, 6))
    meant, found = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (meant, found))
    got = embeddings.compare(meant, found, 5, seed=1)
    cosine = sorted(float(a @ b) for a, b in zip(meant, found, strict=True))
    assert got.mean_cosine == pytest.approx(sum(cosine) / 12)
    assert got.low_cosine == pytest.approx(cosine[0] + 0.55 * (cosine[1] - cosine[0]))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    one = [float(meant[i] @ meant[j]) for i, j in pairs]
    other = [float(found[i] @ found[j]) for i, j in pairs]
    gaps = [sorted(one).index(a) - sorted(other).index(b) for a, b in zip(one, other, strict=True)]
    n = len(pairs)
    expected = 1 - 6 * sum(gap**2 for gap in gaps) / (n * (n**2 - 1))
    assert got.rank_correlation == pytest.approx(expected)
    assert (got.texts, got.tokens) == (12, 5)
    for name in ("mean_cosine", "low_cosine", "rank_correlation"):
        assert got.spreads[name].low <= getattr(got, name) <= got.spreads[name].high
    same = embeddings.compare(meant, meant, 5, seed=1)
    assert (same.mean_cosine, same.rank_correlation) == (pytest.approx(1.0), pytest.approx(1.0))
    assert embeddings.compare(meant[:4], found[:4], 5, seed=1).rank_correlation is None


def test_samples_begin_and_end_as_inputs_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words and more words " * 20)
    recipe = _recipe(
        calibration={
            "source": "file",
            "file": str(tmp_path / "a.txt"),
            "samples": 3,
            "length": 16,
        },
        evaluate={"text": str(tmp_path / "a.txt"), "context": 16, "windows": 2},
    )
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    calibration, evaluation = encoder_texts(recipe.calibration, recipe.evaluate, tokenizer)
    assert calibration.shape == (3, 16)
    assert evaluation.shape == (2, 16)
    for part in (calibration, evaluation):
        assert set(part[:, 0].tolist()) == {1}
        assert set(part[:, -1].tolist()) == {2}


@pytest.mark.slow
def test_the_recipe_runs_to_its_verdict(tmp_path: Path) -> None:
    make_encoder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("An encoder reads a text and says where its meaning lies. " * 40)
    recipe = Path(__file__).parents[2] / "recipes" / "encoder-onnx.yaml"
    overrides = [
        f"model.path={tmp_path / 'model'}",
        f"calibration.file={text}",
        f"evaluate.text={text}",
        "calibration.samples=8",
        "calibration.length=32",
        "evaluate.context=16",
        "evaluate.windows=16",
        "gates.min_cosine=0.05",
        "gates.min_rank_correlation=0.05",
        "speed.rounds=1",
        "speed.prefill=[16]",
        "speed.threads=1",
    ]
    outcome = api.run(recipe, tmp_path / "out", overrides)
    assert outcome.result.verdict.reasons == ()
    low = next(a for a in outcome.result.artifacts if a.role == "compressed")
    assert low.runtime == "onnxruntime"
    assert low.parity is not None
    assert low.parity.passed
    assert low.quality is None
    assert low.speed is not None
    assert [timing.metric for timing in low.speed.timings] == ["prefill_16"]
    assert low.embeddings is not None
    assert low.embeddings.texts == 16
    dense = next(a for a in outcome.result.artifacts if a.role == "dense")
    assert dense.embeddings is not None
    assert low.embeddings.mean_cosine < dense.embeddings.mean_cosine > 0.99
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rank correlation of similarities" in text
    again = api.verify(tmp_path / "out", quality=True, threads=1)
    assert again.verdict.exit_code == 0
    repeated = again.embeddings["onnx-int8"]
    assert repeated.mean_cosine == pytest.approx(low.embeddings.mean_cosine)

    strict = api.run(recipe, tmp_path / "strict", [*overrides, "gates.min_cosine=0.9999"])
    assert strict.result.verdict.exit_code == 4
    assert strict.out is None
    assert "min_cosine failed" in strict.result.verdict.reasons[0]
