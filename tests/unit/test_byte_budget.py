"""Form, rank and type of every matrix for a file of so many bytes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from svdexport import api
from svdexport.allocate.by_bytes import Option, choose
from svdexport.checkpoint import Checkpoint
from svdexport.core.decompose import decompose
from svdexport.core.gauge import in_even_gauge, mixed
from svdexport.core.gptq import GptqConfig, gptq, gptq_pair, relative_error, round_to_nearest
from svdexport.core.grids_gguf import GRIDS
from svdexport.core.lowrank import FactorPair
from svdexport.core.noise import noise_model, relative_noise, share_left
from svdexport.errors import RecipeError
from svdexport.export.gguf_read import read_back
from svdexport.models.blocks import InputGroup, Linear
from svdexport.pipeline import vocabulary
from svdexport.pipeline.byte_budget import _group_options, _matrix_options, _types_of
from svdexport.pipeline.reporter import Reporter
from svdexport.recipe import Quantize, load_recipe
from tests.unit.gguf_models import DEMO_VOCABULARY, load, make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 6, length: 64, seed: 1}
compress: {budget: {bytes: BYTES}}
quantize: {algorithm: gptq}
export: [{format: gguf, type: mixed}]
evaluate: {context: 48, windows: 2}
"""


SIZES = {"hidden_size": 128, "intermediate_size": 256}
# its weights are stored turned; llama.cpp wants a byte-pair vocabulary for it
GPT2 = {"vocab_size": DEMO_VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_ctx": 256}


def random_options(seed: int) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    made = {}
    for part in range(4):
        sizes = np.sort(rng.integers(10, 200, 4))
        losses = np.sort(rng.random(4))[::-1]
        made[str(part)] = [
            Option(int(s), float(x), i, ("t",))
            for i, (s, x) in enumerate(zip(sizes, losses, strict=True))
        ]
    return made


@pytest.mark.parametrize("seed", range(8))
def test_choice_fits_and_is_near_the_best_of_all(seed: int) -> None:
    options = random_options(seed)
    smallest = sum(min(o.bytes for o in found) for found in options.values())
    budget = smallest + 150
    chosen = choose(options, budget)
    assert sum(o.bytes for o in chosen.values()) <= budget
    best = min(
        sum(o.loss for o in combination)
        for combination in itertools.product(*options.values())
        if sum(o.bytes for o in combination) <= budget
    )
    worst = sum(max(o.loss for o in found) for found in options.values())
    assert sum(o.loss for o in chosen.values()) <= best + 0.25 * (worst - best)
    with pytest.raises(RecipeError, match="bytes too few"):
        choose(options, smallest - 1)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_option_of_a_part_would_still_fit(seed: int) -> None:
    options = random_options(seed)
    smallest = sum(min(o.bytes for o in found) for found in options.values())
    for extra in range(0, 400, 20):
        chosen = choose(options, smallest + extra)
        left = smallest + extra - sum(o.bytes for o in chosen.values())
        for part, found in options.items():
            here = chosen[part]
            better = [o.bytes - here.bytes for o in found if o.loss < here.loss]
            assert not better or min(better) > left


def test_predicted_losses_are_those_of_the_quantiser() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    mix = torch.randn(128, 128, generator=generator) * torch.arange(1, 129) ** -0.5
    x = torch.randn(2000, 128, generator=generator) @ mix
    h = (x.T @ x).double()
    y = torch.randn(400, 96, generator=generator) * torch.linspace(0.5, 2, 96)
    g = (y.T @ y).double()
    metric = g + 0.1 * g.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    found = in_even_gauge(decompose([weight], h, [g]), h)
    model = noise_model([weight], found, h, [g], damping=0.01, output_damping=0.1)

    def loss(residual: torch.Tensor) -> float:
        r = residual.double()
        return float((metric @ r @ h * r).sum())

    for name in ("Q8_0", "Q4_0"):
        grid, config = GRIDS[name], GptqConfig(0.01, sweeps=0)
        dense = loss(gptq(weight, h, grid, config).values - weight)
        assert dense == pytest.approx(relative_noise(name) * model.dense, rel=0.5)
        pair = FactorPair(*mixed(found.a[:64], found.b[:, :64]))
        a, b = gptq_pair(pair, h, grid, grid, config)
        noise = relative_noise(name) * float(model.a[63] + model.b[63])
        assert loss(b.values @ a.values - pair.dense()) == pytest.approx(noise, rel=0.6)


@pytest.mark.parametrize("huge", [1.0, 40.0])
@pytest.mark.parametrize("rows", [96, 300])
def test_what_a_pair_beside_quantised_weights_leaves_is_predicted(rows: int, huge: float) -> None:
    """GPTQ's own errors, cut off by a plain SVD in the metric: one type's as they are, and no
    other's are taken for smaller."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 256, generator=generator)
    mix = torch.randn(256, 256, generator=generator) * torch.arange(1, 257) ** -0.5
    mix[:, 3] *= huge  # a channel as large as transformers have some
    x = torch.randn(2000, 256, generator=generator) @ mix
    h = (x.T @ x).double()
    root = torch.linalg.cholesky(h)
    left = share_left(weight, h, 0.001)
    assert left.shape == (min(rows, 256) + 1,) and left[0] == 1.0
    assert left[-1] == pytest.approx(0.0, abs=1e-9) and bool((left.diff() <= 0).all())
    for name, grid in GRIDS.items():
        error = gptq(weight, h, grid, GptqConfig(0.001, sweeps=0)).values - weight
        energies = torch.linalg.svdvals(error.double() @ root).square()
        for rank in (8, 32, 64):
            share = float(energies[rank:].sum() / energies.sum())
            assert share <= float(left[rank]) + 0.02, name
            if name == "Q5_1":
                assert float(left[rank]) == pytest.approx(share, rel=1e-3)


SIZE_OF_BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144)}  # elements, bytes
FOR_FACTORS = ("Q8_0", "Q4_0")  # of a pair beside a quantised matrix


def held(name: str, row: int, rows: int) -> int:
    """Bytes of a matrix in the file, whose tensors start at multiples of 32."""
    elements, size = SIZE_OF_BLOCKS[name]
    return math.ceil(row * rows * size / elements / 32) * 32


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("rows", "beside"), [((33, 31), (32,)), ((33, 70), (32, 64))])
def test_options_have_the_bytes_and_losses_of_the_formulas(
    rows: tuple[int, int], beside: tuple[int, ...], copies: int
) -> None:
    """Each form, rank and types of a group of two linears, and no others."""
    n, count, ladder = 256, sum(rows), ["Q4_K", "Q4_0", "Q8_0"]
    group = InputGroup(0, tuple(Linear(f"l{m}", m, n, False) for m in rows))
    energies = torch.logspace(2, -2, count, dtype=torch.float64)
    of_a = torch.linspace(3.0, 5.0, 64, dtype=torch.float64)  # ranks up to 64 were kept
    of_b = torch.linspace(11.0, 17.0, 64, dtype=torch.float64)
    left = torch.linspace(1.0, 0.0, count + 1, dtype=torch.float64).square()
    dense = torch.tensor(7.0, dtype=torch.float64)
    found = {"energies": energies, "noise.dense": dense, "noise.left": left}
    found |= {"noise.a": of_a, "noise.b": of_b}
    noise = {name: relative_noise(name) for name in ladder}

    def pair_bytes(rank: int, a: str, b: str) -> int:
        size = copies * (160 + held(a, n, rank))  # with what each takes in the header
        return size + sum(160 + held(b, rank, m) for m in rows)

    expected = {}
    for kind in ladder:
        size, loss = sum(held(kind, n, m) for m in rows), noise[kind] * 7.0
        expected["dense", None, (kind,)] = (size, loss)
        for rank, factor in itertools.product(beside, FOR_FACTORS):
            share = float(left[rank])
            share += 2 * noise[factor] * (1 - share)  # what the pair takes, its factors rounded
            both = size + pair_bytes(rank, factor, factor)
            expected["residual", rank, (kind, factor, factor)] = (both, loss * share)
    for rank, a, b in itertools.product((32, 64), ladder, FOR_FACTORS):  # B's rows fill no K block
        loss = float(energies[rank:].sum())
        loss += noise[a] * float(of_a[rank - 1]) + noise[b] * float(of_b[rank - 1])
        expected["pair", rank, (a, b)] = (pair_bytes(rank, a, b), loss)
    made = {
        (form, option.rank, option.types): (option.bytes, option.loss)
        for form, options in _group_options(group, found, 32, ladder, copies)
        for option in options
    }
    assert set(made) == set(expected)
    for key, (size, loss) in expected.items():
        assert made[key] == (size, pytest.approx(loss, rel=1e-9)), key


def test_options_of_a_matrix_are_the_types_that_hold_its_rows() -> None:
    made = _matrix_options(33, 96, 2.0, ["Q4_K", "Q4_0", "Q8_0"])  # rows of 96 fill no K block
    assert {(o.rank, o.types, o.bytes) for o in made} == {
        (None, (kind,), held(kind, 96, 33)) for kind in ("Q4_0", "Q8_0")
    }
    for option in made:
        assert option.loss == pytest.approx(2.0 * relative_noise(option.types[0]))


def test_every_tensor_of_an_option_gets_its_type() -> None:
    group = InputGroup(0, (Linear("q", 8, 32, False), Linear("k", 8, 32, False)))
    dense = {"q.weight": "Q4_K", "k.weight": "Q4_K"}
    pair = {"q.lr_a.weight": "Q8_0", "q.lr_b.weight": "Q4_0", "k.lr_b.weight": "Q4_0"}
    assert _types_of(group, Option(1, 1.0, None, ("Q4_K",))) == dense
    assert _types_of(group, Option(1, 1.0, 32, ("Q8_0", "Q4_0"))) == pair
    assert _types_of(group, Option(1, 1.0, 32, ("Q4_K", "Q8_0", "Q4_0"))) == dense | pair


RESIDUAL = "BYTES, forms: [residual], types: [Q4_0, Q8_0]"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Llama", "Qwen2", "GPT2"])
def test_residual_form_is_written_read_and_computed(tmp_path: Path, model: str) -> None:
    """Checks of the export: parity of llama.cpp with torch, and the round trip."""
    make_model(tmp_path / "model", model, **(GPT2 if model == "GPT2" else SIZES))
    budget = 9_000_000 if model == "GPT2" else 900_000
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("BYTES", RESIDUAL.replace("BYTES", str(budget))))
    (file,) = api.export(path, tmp_path / "out", reporter=Reporter(quiet=True))
    assert file.stat().st_size <= budget
    work = tmp_path / ".out.work"
    checks = [json.loads(p.read_text()) for p in (work / "checks").glob("*.json")]
    assert checks and not any(check["problems"] for check in checks)
    found = api.inspect(file)
    assert "low-rank pairs" in found["runtime"]
    assert {linear["form"] for linear in found["linears"]} <= {
        "residual pair",
        "residual shared pair",
    }
    beside = json.loads((work / "residual.json").read_text())
    assert sum(len(one["linears"]) for one in beside.values()) == len(found["linears"])
    for linear in found["linears"]:
        assert set(linear["types"]) == {"weight", "a", "b"} and linear["rank"] >= 32


@pytest.mark.slow
def test_residual_form_in_sequence_with_trained_norms_is_nearer_than_its_base(
    tmp_path: Path,
) -> None:
    """Its values in torch against the dense model's; without the pairs they are farther."""
    model = load(make_model(tmp_path / "model", "Llama", **SIZES))
    path = tmp_path / "r.yaml"
    text = RECIPE.replace("BYTES", RESIDUAL.replace("BYTES", "900000"))
    path.write_text(
        text.replace("gptq}", "gptq, sequential: true, tune: {steps: 2, learning_rate: 1e-5}}")
    )
    (file,) = api.export(path, tmp_path / "out", reporter=Reporter(quiet=True))
    source = Checkpoint.open(tmp_path / "model")
    work = tmp_path / ".out.work"
    read = dict(read_back(file, source, source.path, None, work / "base"))
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    base = tensors["blk.1.ffn_down.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(base.data, base.tensor_type))
    weight = model.get_parameter(name).detach()
    assert "blk.0.ffn_gate_up.lr_a.weight" in tensors
    whole = torch.from_numpy(read[name])
    assert float((whole - weight).norm()) < 0.9 * float((values - weight).norm())


@pytest.mark.slow
def test_the_file_has_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    sizes = {}
    for budget in (290_000, 400_000):
        path = tmp_path / f"r{budget}.yaml"
        path.write_text(RECIPE.replace("BYTES", str(budget)))
        (file,) = api.export(path, tmp_path / str(budget), reporter=Reporter(quiet=True))
        sizes[budget] = file.stat().st_size
        work = tmp_path / f".{budget}.work"
        types = json.loads((work / "types.json").read_text())
        assert budget * 0.93 <= sizes[budget] <= budget
        assert "model.embed_tokens.weight" in types
        checks = [json.loads(p.read_text()) for p in (work / "checks").glob("*.json")]
        assert checks
        assert not any(check["problems"] for check in checks)


@pytest.mark.slow
def test_only_the_types_that_are_given_are_chosen(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=128, intermediate_size=256)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("BYTES", "400000, types: [IQ4_NL, Q8_0]"))
    api.export(path, tmp_path / "out", reporter=Reporter(quiet=True))
    types = json.loads((tmp_path / ".out.work" / "types.json").read_text())
    assert set(types.values()) == {"IQ4_NL", "Q8_0"}
    path.write_text(RECIPE.replace("BYTES", "400000, types: [Q4_K]"))
    with pytest.raises(RecipeError, match="fill no block of any of them; add one"):
        api.export(path, tmp_path / "none", reporter=Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"type: mixed": "type: Q4_0"}, "needs one export"),
        ({"type: mixed": "type: mixed, head_type: Q8_0"}, "leave out head_type"),
        ({"type: mixed": "type: mixed, type_a: F16"}, "leave out type_a"),
        ({"quantize: {algorithm: gptq}\n": ""}, "quantize section"),
        ({"{budget": "{method: svd_llm, budget"}, "method: kfac_svd"),
        ({"bytes: BYTES": "bytes: 1MB, param_ratio: 0.5"}, "exactly one of"),
        ({"bytes: BYTES": "param_ratio: 0.5, types: [Q4_0]"}, "types is for a budget in bytes"),
        ({"bytes: BYTES": "param_ratio: 0.5"}, "type mixed needs"),
        ({"bytes: BYTES": "param_ratio: 0.5, forms: [pair]"}, "forms is for a budget in bytes"),
    ],
)
def test_what_a_byte_budget_needs_is_said(
    tmp_path: Path, changes: dict[str, str], word: str
) -> None:
    (tmp_path / "model").mkdir()
    text = RECIPE
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / "r.yaml"
    path.write_text(text.replace("BYTES", "1MB"))
    with pytest.raises(RecipeError, match=word):
        load_recipe(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_rounded_in_the_metric_of_its_inputs(tmp_path: Path, tied: bool) -> None:
    model = load(make_model(tmp_path, "Llama", tie_word_embeddings=tied))
    tokens = torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    inputs = vocabulary.head_inputs(model, tokens)
    hidden = model(tokens, output_hidden_states=True).hidden_states[-1].detach().double()
    flat = hidden.reshape(-1, hidden.shape[-1])
    assert inputs is not None
    torch.testing.assert_close(inputs, flat.T @ flat, rtol=1e-4, atol=1e-4)

    table, *head = vocabulary.vocabulary(model)
    assert [table, *head] == ["model.embed_tokens", *([] if tied else ["lm_head"])]
    weight = model.get_submodule(table).weight.detach()
    nearest = round_to_nearest(weight, None, GRIDS["IQ4_NL"])
    found = vocabulary.rounded(model, table, "IQ4_NL", Quantize(), inputs)
    assert torch.equal(found.values, nearest.values) is not tied
    plain = vocabulary.rounded(model, table, "IQ4_NL", Quantize(algorithm="rtn"), inputs)
    assert torch.equal(plain.values, nearest.values)
    read = model.get_output_embeddings().weight.detach()
    best = vocabulary.rounded(model, [table, *head][-1], "IQ4_NL", Quantize(), inputs)
    by_rounding = round_to_nearest(read, None, GRIDS["IQ4_NL"]).values
    assert best.error < 0.8 * relative_error(read, by_rounding, inputs)
    assert torch.equal(weight, model.get_submodule(table).weight)
