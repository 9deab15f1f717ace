"""Parity: arithmetic passes, mistakes do not, on a real (tiny, random) transformers model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdexport.errors import InputError
from svdexport.verify import parity

TOKENS = np.random.default_rng(0).integers(0, 320, parity.POSITIONS)
Change = Callable[[LlamaForCausalLM], None]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.1,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)
    return made


def logits(model: LlamaForCausalLM) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)[None]).logits[0].numpy()


def rounded(
    model: LlamaForCausalLM, kind: tuple[str, str] = ("onnx", "int8"), block: int = 32
) -> np.ndarray:
    rounding = parity.rounding(*kind, block)
    assert rounding is not None
    with parity.rounded_activations(model, rounding):
        return logits(model)


def permuted_rows(model: LlamaForCausalLM) -> None:
    """Rows of q as the converter of the Llama family leaves them: (heads, 2, half) swapped."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.copy_(weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64))


def swapped_layers(model: LlamaForCausalLM) -> None:
    layers = model.model.layers
    one, two = layers[1].mlp.down_proj.weight, layers[2].mlp.down_proj.weight
    kept = one.clone()
    one.copy_(two)
    two.copy_(kept)


def missing_bias(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.o_proj.bias.zero_()


def transposed_square(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.copy_(weight.T.clone())


def dropped_norm(model: LlamaForCausalLM) -> None:
    model.model.layers[2].input_layernorm.weight.mul_(1.3)


MISTAKES = [permuted_rows, swapped_layers, missing_bias, transposed_square, dropped_norm]


@pytest.mark.parametrize("change", MISTAKES)
@pytest.mark.parametrize("kind", [("gguf", "Q8_0"), ("onnx", "int4"), ("gguf", "F16")])
def test_mistakes_fail_at_every_tolerance(
    model: LlamaForCausalLM, change: Change, kind: tuple[str, str]
) -> None:
    limits = parity.tolerance(*kind)
    reference = logits(model)
    wide = rounded(model, kind)
    wrong = copy.deepcopy(model)
    change(wrong)
    got = parity.compare(reference, logits(wrong), limits, wide)
    assert not got.passed and "relative difference" in got.problems[0]
    also_rounded = parity.compare(reference, rounded(wrong, kind), limits, wide)
    assert not also_rounded.passed


def test_rounded_activations_alone_pass(model: LlamaForCausalLM) -> None:
    """Another block size, and another order of the same sums, stand for a runtime's own ways."""
    reference = logits(model)
    for block in (16, 32, 64):
        limits = parity.tolerance("gguf", "Q4_0")
        got = parity.compare(reference, rounded(model, block=block), limits, rounded(model))
        assert got.passed, got.problems
        assert got.activation_noise is not None and got.activation_noise > 0.001
        assert got.max_relative < limits.relative


def with_loud_channels_that_cancel(model: LlamaForCausalLM, times: float) -> LlamaForCausalLM:
    """Every linear sees the difference of two loud channels, as plain SVD leaves a model."""
    made = copy.deepcopy(model)
    loud = made.model.embed_tokens.weight
    loud[:, 0] = 4 + 4 * torch.rand(320, generator=torch.Generator().manual_seed(1))
    loud[:, 1] = loud[:, 0] / 1.37
    made.lm_head.weight[:, :2] = 0
    for layer in made.model.layers:
        for reader in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            reader.weight[:, 0] *= times
            reader.weight[:, 1] = -1.37 * reader.weight[:, 0]
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight[:2] = 0
        layer.self_attn.o_proj.bias[:2] = 0
    return made


@pytest.mark.parametrize("type_name, times", [("F16", 500.0), ("BF16", 80.0)])
def test_a_fragile_model_is_held_to_what_its_own_rounding_does(
    model: LlamaForCausalLM, type_name: str, times: float
) -> None:
    fragile = with_loud_channels_that_cancel(model, times)
    kind = ("gguf", type_name)
    reference, noisy = logits(fragile), rounded(fragile, kind)
    limits = parity.tolerance(*kind)
    # the runtime's rounding falls elsewhere: here, of inputs that were scaled before
    elsewhere = parity.rounding(*kind)
    assert elsewhere is not None
    with parity.rounded_activations(fragile, lambda x: elsewhere(x * 1.37) / 1.37):
        other = logits(fragile)
    assert not parity.compare(reference, other, limits).passed
    got = parity.compare(reference, other, limits, noisy)
    assert got.passed, got.problems
    assert got.max_relative > limits.relative
    sound = parity.compare(logits(model), logits(model), limits, rounded(model, kind))
    assert sound.max_relative == limits.relative and sound.min_top1 == limits.top1


def test_rounding_that_overflows_widens_no_limit() -> None:
    a = np.random.default_rng(1).normal(0, 3, (96, 50)).astype(np.float32)
    overflown = a.copy()
    overflown[40:] = np.nan
    got = parity.compare(a, a + 0.3 * a[::-1], parity.FLOAT16, overflown)
    assert not got.passed and got.activation_noise is None
    assert got.max_relative == parity.FLOAT16.relative


def test_who_rounds_activations() -> None:
    for kind in (("gguf", "F32"), ("onnx", "fp32"), ("checkpoint", "float16"), ("onnx", "fp16")):
        assert parity.rounding(*kind) is None
    x = torch.linspace(-3, 5, 512)
    for kind, width in ((("gguf", "Q8_0"), 32), (("gguf", "Q4_K"), 256), (("onnx", "int4"), 128)):
        found = parity.rounding(*kind, 128)
        assert found is not None
        assert torch.equal(found(x), parity.round_blocks(x, width))
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        found = parity.rounding("gguf", name)
        assert found is not None
        assert torch.equal(found(x), x.to(dtype).float()) and found(x).dtype == torch.float32


def test_a_label_is_held_to_its_coarsest_type() -> None:
    limits = {
        "F16-apart": parity.FLOAT16,
        "F16-stock": parity.FLOAT16,
        "F32-a-F16-plain": parity.FLOAT16,
        "F16-b-BF16": parity.BFLOAT16,
        "F16-head-Q8_0": parity.INT8_ACTIVATIONS,
        "Q4_0-a-F16-b-F16-stock-lora": parity.INT8_ACTIVATIONS,
    }
    for label, meant in limits.items():
        assert parity.tolerance("gguf", label) is meant, label
    x = torch.linspace(-3, 5, 512)
    for label, width in (("Q8_0-embedding-Q6_K", 32), ("Q8_0-b-Q4_K", 256), ("mixed", 256)):
        found = parity.rounding("gguf", label)
        assert found is not None
        assert torch.equal(found(x), parity.round_blocks(x, width))
    half = parity.rounding("gguf", "F16-apart")
    assert half is not None
    assert torch.equal(half(x), x.half().float())


def test_a_drowned_model_is_compared_with_products_in_float32(model: LlamaForCausalLM) -> None:
    reference = logits(model)
    assert not parity.drowned(reference, rounded(model)) and not parity.drowned(reference, None)
    other = -reference
    assert parity.drowned(reference, other)
    limits = parity.tolerance("onnx", "int2")
    assert not parity.compare(reference, other, limits, other).passed
    got = parity.compare(reference, reference + 1e-5, limits, other, exact=True)
    assert got.passed and got.max_relative == parity.FLOAT32.relative
    assert got.activation_noise is not None and got.activation_noise > 0.3
    for change in MISTAKES:
        wrong = copy.deepcopy(model)
        change(wrong)
        assert not parity.compare(reference, logits(wrong), limits, other, exact=True).passed


def test_half_precision_passes_its_own_tolerance_and_not_that_of_float32(
    model: LlamaForCausalLM,
) -> None:
    half = logits(copy.deepcopy(model).to(torch.bfloat16).float())
    reference = logits(model)
    assert parity.compare(reference, half, parity.BFLOAT16).passed
    assert not parity.compare(reference, half, parity.FLOAT32).passed
    double = copy.deepcopy(model).double()
    exact = logits(double).astype(np.float32)
    assert parity.compare(reference, exact, parity.FLOAT32).passed


def test_the_expected_agreement_is_the_mean_over_many_draws() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(0, 1, (400, 3))
    a[:, 2] -= 20.0  # two tokens compete
    one = a + rng.normal(0, 0.4, (400, 1)) + rng.normal(0, 0.3, a.shape)
    draws = [
        (
            a.argmax(1) == (a + rng.normal(0, 1, a.shape) * (one - a).std(1)[:, None]).argmax(1)
        ).mean()
        for _ in range(200)
    ]
    assert parity.expected_top1(a, one) == pytest.approx(np.mean(draws), abs=0.005)
    assert parity.expected_top1(a, a) == 1.0
    assert parity.expected_top1(a, a + 7.0) == pytest.approx(1.0)


def test_the_limit_of_agreement_does_not_hang_on_one_draw() -> None:
    """The top tokens of ten draws of one noise agree as they may; unlike ones would not."""
    rng = np.random.default_rng(6)
    a = rng.normal(0, 3, (96, 5000)).astype(np.float32)

    def drawn(size: float) -> parity.Logits:
        return (a + rng.normal(0, size, a.shape)).astype(np.float32)

    limits = {parity.compare(a, a, parity.INT8_ACTIVATIONS, drawn(0.1)).min_top1 for _ in range(10)}
    assert max(limits) - min(limits) < 0.01
    for _ in range(10):
        assert parity.compare(a, drawn(0.1), parity.INT8_ACTIVATIONS, drawn(0.1)).passed
    far = parity.compare(a, drawn(0.19), parity.INT8_ACTIVATIONS, drawn(0.02))
    assert any("top token" in problem for problem in far.problems)


def test_figures_are_the_plain_formulas() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0, 3, (20, 50)).astype(np.float32)
    b = (a + rng.normal(0, 0.1, a.shape)).astype(np.float32)
    got = parity.compare(a, b, parity.INT8_ACTIVATIONS)
    gap = np.abs(a.astype(float) - b.astype(float))
    assert got.max_abs_diff == gap.max() and got.mean_abs_diff == pytest.approx(gap.mean())
    assert got.spread == pytest.approx(a.astype(float).std())
    assert got.relative == pytest.approx(np.sqrt((gap**2).mean()) / got.spread)
    assert got.worst_relative == pytest.approx(np.sqrt((gap**2).mean(1)).max() / got.spread)
    assert got.top1_agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert (got.positions, got.activation_noise) == (20, None)


def test_single_wrong_position_is_found() -> None:
    a = np.random.default_rng(1).normal(0, 3, (96, 50)).astype(np.float32)
    b = a.copy()
    b[40] += np.random.default_rng(2).normal(0, 1, 50)
    got = parity.compare(a, b, parity.INT8_ACTIVATIONS)
    assert got.relative < parity.INT8_ACTIVATIONS.relative
    assert any("position 40" in problem for problem in got.problems)


def test_nan_is_a_problem_and_not_an_accident() -> None:
    a = np.random.default_rng(1).normal(0, 3, (8, 50)).astype(np.float32)
    b = a.copy()
    b[3, 7] = np.nan
    got = parity.compare(a, b, parity.FLOAT32)
    assert "first at position 3" in got.problems[0]
    assert np.isfinite(got.relative) and np.isfinite(got.max_abs_diff)


def test_limits_never_widen_to_where_nothing_is_told() -> None:
    a = np.random.default_rng(1).normal(0, 3, (96, 500)).astype(np.float32)
    unrelated = np.random.default_rng(2).normal(0, 3, a.shape).astype(np.float32)
    got = parity.compare(a, unrelated, parity.INT8_ACTIVATIONS, unrelated)
    assert not got.passed and got.max_relative == 0.6


def test_reference_without_meaning_is_refused() -> None:
    a = np.ones((4, 5), np.float32)
    with pytest.raises(InputError, match="all equal"):
        parity.compare(a, a, parity.FLOAT32)
    with pytest.raises(InputError, match="shape"):
        parity.compare(a, a[:2], parity.FLOAT32)


def test_rounding_is_that_of_q8_0_and_hooks_are_removed(model: LlamaForCausalLM) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).normal(0, 2, (3, 64)).astype(np.float32)
    q8 = GGMLQuantizationType.Q8_0
    expected = dequantize(quantize(values, q8), q8)
    got = parity.round_blocks(torch.tensor(values), 32).numpy()
    # Q8_0 keeps its scale in half precision
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)
    assert torch.equal(parity.round_blocks(torch.zeros(2, 40), 32), torch.zeros(2, 40))
    before = logits(model)
    assert not np.array_equal(rounded(model), before)
    np.testing.assert_array_equal(logits(model), before)
