"""llama.cpp with low-rank pairs: the logits of the dense file with B A, and what it refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from tests.runtime import models, session
from tests.runtime.models import (
    TinyModel,
    as_fused_pairs,
    as_pairs,
    as_residual,
    as_shared_pairs,
    decoder,
)
from tests.runtime.session import TOKENS, RefusedError, logits, opened, supports_low_rank

# F32 arithmetic in another order: the largest difference relative to the logits' standard deviation
TOLERANCE = 2e-5

WARNING = 3  # GGML_LOG_LEVEL_WARN


@pytest.fixture(scope="module", autouse=True)
def pair_capable_library() -> None:
    assert supports_low_rank(), (
        "the installed llama-cpp-python does not run low-rank pairs: "
        "pip install the wheel whose path `python tools/llama_cpp/build.py` prints"
    )


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    spread = want.std()
    assert spread > 0.1
    assert np.abs(got - want).max() < tolerance * spread
    assert (got.argmax(1) == want.argmax(1)).all()


@pytest.mark.parametrize(
    "model",
    [decoder(), decoder("qwen2", biases=True), decoder(experts=models.EXPERTS)],
    ids=["llama", "qwen2 with biases", "mixture of experts"],
)
@pytest.mark.parametrize("form", [as_pairs, as_residual], ids=["pairs", "residual"])
def test_pairs_give_the_dense_logits(
    tmp_path: Path, model: TinyModel, form: Callable[[TinyModel], TinyModel]
) -> None:
    dense = logits(model.write(tmp_path / "dense.gguf"))
    pairs = logits(form(model).write(tmp_path / "pairs.gguf"))
    assert_close(pairs, dense)


@pytest.mark.parametrize("form", [as_shared_pairs, as_fused_pairs])
@pytest.mark.parametrize(
    "model", [decoder(), decoder("qwen2", biases=True)], ids=["llama", "qwen2"]
)
def test_shared_factors_give_the_dense_logits(
    tmp_path: Path, model: TinyModel, form: Callable[[TinyModel], TinyModel]
) -> None:
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert_close(logits(form(model).write(tmp_path / "shared.gguf")), dense)


def test_head_as_pair(tmp_path: Path) -> None:
    model = decoder()
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert_close(logits(as_pairs(model, output=True).write(tmp_path / "pairs.gguf")), dense)


def test_fused_qkv_as_pair(tmp_path: Path) -> None:
    model = decoder()
    tensors = dict(model.tensors)
    for layer in range(models.LAYERS):
        parts = [tensors.pop(f"blk.{layer}.attn_{x}.weight") for x in "qkv"]
        a, b = models.factors(np.concatenate(parts))
        tensors |= {f"blk.{layer}.attn_qkv.lr_a.weight": a, f"blk.{layer}.attn_qkv.lr_b.weight": b}
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert_close(logits(model.with_tensors(tensors).write(tmp_path / "fused.gguf")), dense)


def test_gate_and_up_beside_the_factors_that_they_share(tmp_path: Path) -> None:
    model = decoder()
    names = [f"blk.{i}.ffn_{name}.weight" for i in range(models.LAYERS) for name in ("gate", "up")]
    dense = {name: model.tensors[name] for name in names}
    summed = model.tensors | {name: 2 * weight for name, weight in dense.items()}
    both = model.with_tensors(as_fused_pairs(model).tensors | dense)
    want = logits(model.with_tensors(summed).write(tmp_path / "summed.gguf"))
    assert_close(logits(both.write(tmp_path / "both.gguf")), want)


def test_some_dense_some_pairs_some_residual(tmp_path: Path) -> None:
    model = decoder()
    pairs, residual = as_shared_pairs(model).tensors, as_residual(model).tensors
    mixed = {
        name: tensor
        for form, layer_prefix in (
            (pairs, "blk.0."),
            (residual, "blk.1."),
            (model.tensors, ("t", "o")),
        )
        for name, tensor in form.items()
        if name.startswith(layer_prefix)
    }
    mixed = {
        name: value for name, value in mixed.items() if not name.startswith("blk.1.attn_output.lr")
    }
    mixed["blk.1.attn_output.weight"] = model.tensors["blk.1.attn_output.weight"]
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert_close(logits(model.with_tensors(mixed).write(tmp_path / "mixed.gguf")), dense)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_quantised_factors(tmp_path: Path, kind: str) -> None:
    """Each factor is multiplied in its own type: as F32 factors of the same values."""
    quant = gguf.GGMLQuantizationType[kind]
    pairs = as_shared_pairs(decoder())
    types = {name: quant for name in pairs.tensors if ".lr_" in name}
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(tensor.astype(np.float32), quant), quant)
        if name in types
        else tensor
        for name, tensor in pairs.tensors.items()
    }
    want = logits(pairs.with_tensors(rounded).write(tmp_path / "f32.gguf"))
    tensors = {name: tensor.astype(np.float32) for name, tensor in pairs.tensors.items()}
    got = logits(TinyModel(pairs.arch, pairs.metadata, tensors, types).write(tmp_path / "q.gguf"))
    # llama.cpp rounds the activations of such products too (to F16 or Q8_0)
    assert np.abs(got - want).max() < 0.1 * want.std()


OPTIONS: dict[str, dict[str, object]] = {
    "no mmap": {"mmap": False},
    "gpu layers asked for": {"gpu_layers": 99},
    "two threads": {"threads": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_the_runtime(tmp_path: Path, options: dict[str, object]) -> None:
    model = decoder()
    dense = logits(model.write(tmp_path / "dense.gguf"), **options)
    assert_close(logits(as_shared_pairs(model).write(tmp_path / "pairs.gguf"), **options), dense)


@pytest.mark.parametrize("cache", ["F32", "F16", "Q8_0"])
def test_flash_attention_and_its_cache_types(tmp_path: Path, cache: str) -> None:
    """They round, to F16 and the cache's type: within what that costs the dense model."""
    model = decoder()
    path = model.write(tmp_path / "dense.gguf")
    options = {"cache_type": getattr(llama_cpp, f"GGML_TYPE_{cache}"), "flash_attention": True}
    exact, dense = logits(path), logits(path, **options)
    pairs = logits(as_shared_pairs(model).write(tmp_path / "pairs.gguf"), **options)
    cost = np.abs(dense - exact).max()
    assert 0 < cost < 0.2 * exact.std()
    assert np.abs(pairs - dense).max() <= cost


def test_state_is_saved_and_loaded(tmp_path: Path) -> None:
    path = as_shared_pairs(decoder()).write(tmp_path / "pairs.gguf")
    with opened(path) as first:
        first.decode(TOKENS[:16])
        state = first.state()
        want = first.decode(TOKENS[16:], start=16)
    with opened(path) as second:
        second.set_state(state)
        got = second.decode(TOKENS[16:], start=16)
    np.testing.assert_array_equal(got, want)


def test_several_sequences(tmp_path: Path) -> None:
    path = as_shared_pairs(decoder()).write(tmp_path / "pairs.gguf")
    other = [(token * 5 + 2) % 90 for token in TOKENS]
    with opened(path, sequences=2) as session:
        session.decode(TOKENS[:16], sequence=0)
        session.decode(other[:16], sequence=1)
        got = [
            session.decode(tokens[16:], start=16, sequence=i)
            for i, tokens in enumerate((TOKENS, other))
        ]
    for result, tokens in zip(got, (TOKENS, other), strict=True):
        assert_close(result, logits(path, tokens)[16:])


@pytest.mark.parametrize("form", [as_pairs, as_shared_pairs, as_fused_pairs, as_residual])
def test_lora_adapter_on_top(tmp_path: Path, form: Callable[[TinyModel], TinyModel]) -> None:
    model = decoder()
    rng = np.random.default_rng(1)
    deltas = {
        name: (
            0.3 * rng.standard_normal((4, tensor.shape[1])) / 8,
            rng.standard_normal((len(tensor), 4)) / 2,
        )
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_up.weight", "blk.1.attn_output.weight")
        for tensor in [model.tensors[name]]
    }
    merged = {name: tensor.copy() for name, tensor in model.tensors.items()}
    for name, (a, b) in deltas.items():
        merged[name] += b @ a
    adapter = models.write_lora(tmp_path / "lora.gguf", model, deltas)
    path = form(model).write(tmp_path / "pairs.gguf")
    want = logits(model.with_tensors(merged).write(tmp_path / "merged.gguf"))
    assert np.abs(logits(path) - want).max() > 0.1 * want.std()  # the adapter matters
    assert_close(logits(path, loras=[adapter]), want)


def operations(path: Path) -> dict[str, int]:
    with opened(path, count=True) as session:
        session.decode(TOKENS[:4])
        return session.operations


def test_a_shared_factor_multiplies_once(tmp_path: Path) -> None:
    """A layer has 7 products by weights; pairs add one each, a shared A one per group, and where
    gate and up share B, too, that one is instead of another.
    """
    model = decoder()
    dense = operations(model.write(tmp_path / "dense.gguf"))
    separate = operations(as_pairs(model).write(tmp_path / "pairs.gguf"))
    shared = operations(as_shared_pairs(model).write(tmp_path / "shared.gguf"))
    assert separate["MUL_MAT"] - dense["MUL_MAT"] == 7 * models.LAYERS
    assert shared["MUL_MAT"] - dense["MUL_MAT"] == 4 * models.LAYERS
    fused = operations(as_fused_pairs(model).write(tmp_path / "fused.gguf"))
    assert fused["MUL_MAT"] - dense["MUL_MAT"] == 3 * models.LAYERS
    other = {name: count for name, count in dense.items() if name != "MUL_MAT"}
    assert {name: shared[name] for name in other} == other


@pytest.mark.parametrize("form", [as_shared_pairs, as_fused_pairs])
def test_saved_model_keeps_its_pairs(
    form: Callable[[TinyModel], TinyModel], tmp_path: Path
) -> None:
    path = form(decoder()).write(tmp_path / "pairs.gguf")
    with opened(path) as session:
        session.save(tmp_path / "saved.gguf")
    np.testing.assert_array_equal(logits(tmp_path / "saved.gguf"), logits(path))


def test_quantize_takes_pairs(tmp_path: Path) -> None:
    """llama_model_quantize quantises factors as it does any weight, and the result runs."""
    path = as_shared_pairs(decoder()).write(tmp_path / "pairs.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    out = tmp_path / "q8.gguf"
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.attn_qkv.lr_a.weight"] == gguf.GGMLQuantizationType.Q8_0
    want = logits(path)
    assert np.abs(logits(out) - want).max() < 0.2 * want.std()


def refusal(tmp_path: Path, model: TinyModel) -> str:
    with pytest.raises(RefusedError) as caught:
        logits(model.write(tmp_path / "bad.gguf"))
    return str(caught.value)


def error_line(message: str) -> str:
    """The one line in which llama.cpp says why it does not load a file."""
    (line,) = (line for line in message.splitlines() if "error loading model" in line)
    return line


BAD_SHAPES: dict[str, tuple[str, tuple[slice, slice]]] = {
    "A takes too few inputs": ("blk.1.ffn_down.lr_a.weight", (slice(None), slice(0, -8))),
    "B gives too few outputs": ("blk.1.ffn_down.lr_b.weight", (slice(0, -8), slice(None))),
    "B has another rank than A": ("blk.1.ffn_down.lr_b.weight", (slice(None), slice(0, -8))),
    "a shared A takes too few inputs": ("blk.0.attn_qkv.lr_a.weight", (slice(None), slice(0, -8))),
    "a member of a group has another rank": (
        "blk.0.attn_k.lr_b.weight",
        (slice(None), slice(0, -8)),
    ),
}


@pytest.mark.parametrize(("name", "part"), BAD_SHAPES.values(), ids=BAD_SHAPES.keys())
def test_bad_shape_is_refused_by_name(tmp_path: Path, name: str, part: tuple[slice, slice]) -> None:
    model = as_shared_pairs(decoder())
    model.tensors[name] = model.tensors[name][part]
    assert f"tensor '{name}' has wrong shape" in refusal(tmp_path, model)


def test_bad_rows_of_a_shared_b_are_refused_by_name(tmp_path: Path) -> None:
    model, name = as_fused_pairs(decoder()), "blk.1.ffn_gate_up.lr_b.weight"
    tensors = model.tensors | {name: model.tensors[name][:-8]}
    assert f"tensor '{name}' has wrong shape" in refusal(tmp_path, model.with_tensors(tensors))
    without = {key: value for key, value in model.tensors.items() if "gate_up.lr_a" not in key}
    assert "ffn_gate_up.lr_a.weight" in refusal(tmp_path, model.with_tensors(without))


def test_rows_of_a_shared_b_that_no_weight_takes_are_refused(tmp_path: Path) -> None:
    model = as_fused_pairs(decoder())
    own = {key: value for key, value in as_pairs(decoder()).tensors.items() if "0.ffn_gate" in key}
    assert len(own) == 2  # with factors of its own, gate leaves half of the shared B to nobody
    message = refusal(tmp_path, model.with_tensors(model.tensors | own))
    assert f"takes {models.HIDDEN} of the {2 * models.HIDDEN} rows" in message
    assert "blk.0.ffn_gate_up.lr_b.weight" in message


def test_bad_shape_of_an_expert_pair_is_refused_by_name(tmp_path: Path) -> None:
    model = as_pairs(decoder(experts=models.EXPERTS))
    name = "blk.0.ffn_up_exps.lr_b.weight"
    model.tensors[name] = model.tensors[name][:-1]
    assert f"tensor '{name}' has wrong shape" in refusal(tmp_path, model)


def test_bad_shape_of_w_beside_a_pair_is_refused_by_name(tmp_path: Path) -> None:
    model = as_residual(decoder())
    name = "blk.0.attn_output.weight"
    model.tensors[name] = model.tensors[name][:-8]
    assert f"tensor '{name}' has wrong shape" in refusal(tmp_path, model)


@pytest.mark.parametrize("missing", ["blk.1.ffn_down.lr_a.weight", "blk.0.attn_qkv.lr_a.weight"])
def test_missing_a_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    model = as_shared_pairs(decoder())
    del model.tensors[missing]
    message = refusal(tmp_path, model)
    assert f"'{missing}'" in message
    assert "found" in message


@pytest.mark.parametrize("form", [as_shared_pairs, as_residual])
def test_missing_b_is_refused_by_name(
    tmp_path: Path, form: Callable[[TinyModel], TinyModel]
) -> None:
    model = form(decoder())
    del model.tensors["blk.1.ffn_down.lr_b.weight"]
    assert "tensor 'blk.1.ffn_down.lr_b.weight' not found" in refusal(tmp_path, model)


LONE_A: dict[str, tuple[Callable[[TinyModel], TinyModel], tuple[str, ...], tuple[str, ...]]] = {
    "of a group, B of one member missing": (
        as_shared_pairs,
        ("blk.0.attn_k.lr_b.weight",),
        ("blk.0.attn_k.weight", "blk.0.attn_k.lr_b.weight"),
    ),
    "of gate and up, their B missing": (
        as_fused_pairs,
        ("blk.1.ffn_gate_up.lr_b.weight",),
        ("blk.1.ffn_gate.weight", "blk.1.ffn_gate.lr_b.weight", "blk.1.ffn_gate_up.lr_b.weight"),
    ),
    "of a group, all else missing": (
        as_shared_pairs,
        tuple(f"blk.0.attn_{x}.lr_b.weight" for x in "qkv"),
        ("blk.0.attn_q.weight", "blk.0.attn_q.lr_b.weight", "blk.0.attn_qkv.lr_b.weight"),
    ),
}


@pytest.mark.parametrize(("form", "missing", "named"), LONE_A.values(), ids=LONE_A.keys())
def test_a_without_its_b_is_refused_with_the_names_of_what_is_missing(
    tmp_path: Path,
    form: Callable[[TinyModel], TinyModel],
    missing: tuple[str, ...],
    named: tuple[str, ...],
) -> None:
    model = form(decoder())
    for name in missing:
        del model.tensors[name]
    line = error_line(refusal(tmp_path, model))
    assert line.endswith("found")
    assert all(f"'{name}'" in line for name in named)


def test_factor_alone_beside_dense_weights_is_refused_with_the_name_of_the_other(
    tmp_path: Path,
) -> None:
    model = decoder()
    for lone, other in ("ab", "ba"):
        name, missing = (f"blk.0.ffn_other.lr_{x}.weight" for x in (lone, other))
        alone = model.tensors | {name: np.ones((8, 8))}
        line = error_line(refusal(tmp_path, model.with_tensors(alone)))
        assert f"'{name}'" in line and f"there is no '{missing}'" in line
    shared = model.tensors | {"blk.1.attn_qkv.lr_a.weight": np.ones((8, models.WIDTH))}
    line = error_line(refusal(tmp_path, model.with_tensors(shared)))
    assert "'blk.1.attn_qkv.lr_a.weight'" in line
    assert "there is no 'blk.1.attn_qkv.lr_b.weight'" in line


VERSION = "svdexport.low_rank.version"


def write_with(monkeypatch: pytest.MonkeyPatch, add: str, key: str, value: object) -> None:
    """Files written from now on have one entry of metadata more."""

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            getattr(self, add)(key, value)
            super().write_header_to_file(path)

    monkeypatch.setattr(models.gguf, "GGUFWriter", Writer)


def test_version_1_is_what_a_file_without_a_version_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = as_shared_pairs(decoder())
    want = logits(model.write(tmp_path / "without.gguf"))
    write_with(monkeypatch, "add_uint32", VERSION, 1)
    path = model.write(tmp_path / "version1.gguf")
    assert gguf.GGUFReader(path).fields[VERSION].contents() == 1
    np.testing.assert_array_equal(logits(path), want)


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
@pytest.mark.parametrize("form", [as_pairs, as_fused_pairs, as_residual])
def test_another_version_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    form: Callable[[TinyModel], TinyModel],
) -> None:
    write_with(monkeypatch, "add_uint32", VERSION, version)
    line = error_line(refusal(tmp_path, form(decoder())))
    assert f"low-rank factors of version {version} are not supported" in line


def test_another_version_is_refused_before_its_tensors_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with(monkeypatch, "add_uint32", VERSION, 2)
    model = as_pairs(decoder())
    name = "blk.0.attn_q.lr_b.weight"
    model.tensors[name] = model.tensors[name][:-8]
    assert "low-rank factors of version 2" in error_line(refusal(tmp_path, model))


def test_version_of_another_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with(monkeypatch, "add_string", VERSION, "1")
    line = error_line(refusal(tmp_path, as_pairs(decoder())))
    assert f"{VERSION} has wrong type str" in line


def test_pair_of_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    """It is read row by row, not multiplied by; where it is tied, the head is the same tensor."""
    model = decoder()
    for tied in (False, True):
        tensors = dict(model.tensors)
        if tied:
            del tensors["output.weight"]
        a, b = models.factors(tensors.pop("token_embd.weight"))
        tensors |= {"token_embd.lr_a.weight": a, "token_embd.lr_b.weight": b}
        assert "token_embd" in refusal(tmp_path, model.with_tensors(tensors))


def test_pair_that_no_weight_takes_is_refused_by_name(tmp_path: Path) -> None:
    model = decoder()
    model.tensors["blk.0.ffn_other.lr_a.weight"] = np.ones((8, models.WIDTH))
    model.tensors["blk.0.ffn_other.lr_b.weight"] = np.ones((models.WIDTH, 8))
    assert "blk.0.ffn_other.lr_a.weight" in refusal(tmp_path, model)


@pytest.mark.parametrize("stem", ["blk.1.attn_q", "blk.0.attn_kv_b"])
@pytest.mark.parametrize("residual", [False, True], ids=["pair", "residual"])
def test_architecture_that_multiplies_directly_is_refused_at_load(
    tmp_path: Path, stem: str, residual: bool
) -> None:
    model = models.multi_latent()
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert np.isfinite(dense).all()
    a, b = models.factors(model.tensors[f"{stem}.weight"])
    tensors = model.tensors | {f"{stem}.lr_a.weight": a, f"{stem}.lr_b.weight": b}
    if not residual:
        del tensors[f"{stem}.weight"]
    message = refusal(tmp_path, model.with_tensors(tensors))
    assert f"{stem}.weight" in message and "'plm'" in message
    assert "error loading model" in message


def test_other_weights_of_that_architecture_may_be_pairs(tmp_path: Path) -> None:
    model = models.multi_latent()
    tensors = dict(model.tensors)
    for stem in ("blk.0.attn_output", "blk.1.ffn_up"):
        a, b = models.factors(tensors.pop(f"{stem}.weight"))
        tensors |= {f"{stem}.lr_a.weight": a, f"{stem}.lr_b.weight": b}
    dense = logits(model.write(tmp_path / "dense.gguf"))
    assert_close(logits(model.with_tensors(tensors).write(tmp_path / "pairs.gguf")), dense)


def test_check_that_cannot_be_made_at_load_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model without a head of its own gets no context without its target's."""
    shapes = {
        **dict.fromkeys(("attn_norm", "attn_norm_2", "ffn_norm"), (128,)),
        **dict.fromkeys(("attn_k", "attn_v"), (64, 256)),
        **{"attn_q.lr_a": (32, 256), "attn_q.lr_b": (128, 32), "attn_output": (128, 128)},
        **{"ffn_gate": (192, 128), "ffn_up": (192, 128), "ffn_down": (128, 192)},
    }
    tensors = {f"blk.0.{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    tensors |= {"fc.weight": np.ones((128, 3 * 128)), "output_norm.weight": np.ones(128)}
    metadata = decoder().metadata | {"block_count": 1, "target_hidden_size": 128}
    write_with(monkeypatch, "add_array", "eagle3.target_layers", [0, 1, 2])
    path = TinyModel("eagle3", metadata, tensors).write(tmp_path / "draft.gguf")

    logged: list[tuple[int, str]] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _data: object) -> None:
        logged.append((level, text.decode(errors="replace")))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    llama_cpp.llama_log_set(session._collect, ctypes.c_void_p(0))
    assert model, logged
    llama_cpp.llama_model_free(model)
    levels = [level for level, text in logged if "not checked whether the architecture" in text]
    assert levels == [WARNING]
