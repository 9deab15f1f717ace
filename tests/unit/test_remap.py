"""Dobi-SVD's remapped layout: slots, sizes, the checkpoint and its loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdexport
from svdexport import api
from svdexport.allocate import STRATEGIES
from svdexport.allocate.base import Candidate
from svdexport.checkpoint import SLOTS, Checkpoint
from svdexport.core.remap import SCALE_SLOTS, rank_in, remap, restore, slots_per_rank
from svdexport.errors import InputError, RecipeError
from svdexport.export import ExportRequest
from svdexport.export.checkpoint import export
from svdexport.models.blocks import InputGroup, Linear
from svdexport.pipeline.reporter import Reporter
from svdexport.pipeline.trials import _pairs
from svdexport.recipe import CheckpointExport, load_recipe
from svdexport.safety import check_model_folder
from tests.unit.gguf_models import compress, make_model

RECIPE = """\
schema: 1
model: {path: model}
calibration: {samples: 6, length: 64, seed: 1}
compress: {method: svd_llm, budget: {param_ratio: 0.75}, rank_multiple: 8}
export: [{format: checkpoint, layout: remapped}]
evaluate: {context: 48, windows: 2}
"""


def slow(slots: Tensor, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Entry by entry, from the bytes."""
    rows = slots.numpy()
    long, short = np.zeros((len(rows), max(m, n))), np.zeros((len(rows), min(m, n)))
    for j, row in enumerate(rows):
        sizes = row[-SCALE_SLOTS:].tobytes()
        top, other = np.frombuffer(sizes, np.float32)
        data = row[:-SCALE_SLOTS].tobytes()
        for i in range(max(m, n)):
            word = data[2 * i : 2 * i + 2]
            if i < min(m, n):
                low, high = np.frombuffer(word, np.int8)
                long[j, i] = low * np.float32(top / np.float32(127))
                short[j, i] = high * np.float32(other / np.float32(127))
            else:
                long[j, i] = np.float32(np.frombuffer(word, np.float16)[0]) * top
    return (short, long.T) if m >= n else (long, short.T)


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12), (9, 9), (1, 5)])
def test_slots_hold_8_and_16_bits(m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randn(4, n, generator=generator), torch.randn(m, 4, generator=generator) * 1e6
    b[:, 2] = 0.0
    slots = remap(a, b)
    assert slots.dtype == torch.int16
    assert slots.shape == (4, max(m, n) + SCALE_SLOTS)
    one, two = restore(slots, m, n)
    expected = slow(slots, m, n)
    assert np.array_equal(one.double().numpy(), expected[0])
    assert np.array_equal(two.double().numpy(), expected[1])
    assert float((one - a).abs().max()) <= float(a.abs().max()) / 250
    assert float((two - b).abs().max()) <= float(b.abs().max()) / 250
    assert not two[:, 2].any()


def test_the_tail_has_16_bits() -> None:
    a, b = torch.randn(3, 8), torch.randn(100, 3)
    _, two = restore(remap(a, b), 100, 8)
    tail = (two - b)[8:].abs() / b.abs().amax(dim=0)
    assert float(tail.max()) < 2**-11


def test_rank_and_bytes_are_one_to_one() -> None:
    m, n = 40, 24
    size = 2 * (slots_per_rank(m, n) + SCALE_SLOTS)
    for rank in range(1, n + 1):
        assert remap(torch.ones(rank, n), torch.ones(m, rank)).numel() * 2 == rank * size
        assert rank_in(rank * size, m, n) == rank
        assert rank_in(rank * size - 1, m, n) == rank - 1
    assert rank_in(10**9, m, n) == n


def test_the_planner_may_take_ranks_past_break_even() -> None:
    energies = np.linspace(1, 0.5, 24)
    items = [Candidate(name, 40, 24, energies=energies, remapped=True) for name in "ab"]
    assert items[0].ranks(1) == list(range(1, 24))  # break-even of k (m + n) would be 15
    for strategy in ("uniform", "greedy"):
        chosen = STRATEGIES[strategy].allocate(items, 0.75, 1, None)  # type: ignore[arg-type]
        ranks = [chosen[name].rank for name in "ab"]
        assert all(rank is None or rank <= 23 for rank in ranks)
        kept = sum(24 if rank is None else rank for rank in ranks) / 48
        assert 0.7 <= kept <= 0.75


def test_odd_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        restore(torch.zeros((2, 9), dtype=torch.int16), 12, 7)
    with pytest.raises(ValueError, match="infinite"):
        remap(torch.full((1, 2), torch.inf), torch.ones(3, 1))


def test_a_remapped_checkpoint_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_model(tmp_path / "model", "Llama", hidden_size=64, intermediate_size=96)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    (folder,) = api.export(recipe, tmp_path / "out", reporter=Reporter(quiet=True))
    opened = Checkpoint.open(folder)
    assert any(name.endswith(SLOTS) for name in opened.files)
    assert not any(".lr_a." in name for name in opened.files)
    assert any(spec.rank * 2 > 64 for spec in opened.low_rank.values())  # past break-even
    checks = [json.loads(p.read_text()) for p in (tmp_path / ".out.work" / "checks").glob("*.json")]
    assert checks
    assert not any(check["problems"] for check in checks)
    assert svdexport.__version__
    plan = json.loads((tmp_path / ".out.work" / "plan.json").read_text())
    kept = sum(row["params"] for row in plan) / sum(row["params_dense"] for row in plan)
    assert 0.65 <= kept <= 0.75
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    for name in opened.names():
        if ".lr_" in name:
            assert torch.equal(state[name], opened.tensor(name))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["remapped"].popitem()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit"):
        Checkpoint.open(folder)


def test_where_every_linear_stays_dense_there_are_no_slots(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "Llama", hidden_size=64, intermediate_size=96)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("0.75", "1.0"))
    (folder,) = api.export(recipe, tmp_path / "out", reporter=Reporter(quiet=True))
    source, written = Checkpoint.open(tmp_path / "model"), Checkpoint.open(folder)
    assert "quantization_config" not in written.config
    assert written.names() == source.names()
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in source.names())


def exported(place: Path, *layouts: str) -> list[Path]:
    """Checkpoints of a tiny model, q, k and v in one group, in each layout."""
    make_model(place / "model", "Llama", hidden_size=64, intermediate_size=96)
    low = Checkpoint.open(compress(place / "model", place / "low", 24)[0])
    folders = []
    for layout in layouts:
        spec = CheckpointExport(layout=layout)  # type: ignore[arg-type]
        request = ExportRequest(low, place / "model", None, place / layout, place, spec)
        folders.append(export(request).path)
    return folders


def test_a_remapped_checkpoint_is_an_artifact_like_others(tmp_path: Path) -> None:
    folder, factors = exported(tmp_path, "remapped", "factors")
    model = check_model_folder(folder)
    slots = {name: info for name, info in model.tensors.items() if name.endswith(SLOTS)}
    # q, k and v; o; gate and up; down
    assert {info.shape for info in slots.values()} == {(24, n + 4) for n in (128, 64, 192, 96)}
    assert {info.dtype for info in slots.values()} == {"I16"}
    linears = api.inspect(folder)["linears"]
    assert {entry["rank"] for entry in linears} == {24}
    assert {entry["form"] for entry in linears} == {"pair", "shared pair"}
    text = tmp_path / "t.txt"
    text.write_text("the model reads what it writes " * 20)
    found = api.evaluate(folder, text, context=32, windows=1, threads=1)["perplexity"]
    same = api.evaluate(factors, text, context=32, windows=1, threads=1)["perplexity"]
    assert found == pytest.approx(same, rel=0.05)


def test_wrong_slots_are_refused_with_one_line(tmp_path: Path) -> None:
    (folder,) = exported(tmp_path, "remapped")
    config, tensors = folder / "config.json", folder / "model.safetensors"
    sound, held = json.loads(config.read_text()), load_file(tensors)
    name = next(name for name in held if name.endswith(f"q_proj{SLOTS}"))
    linear = name.removesuffix(SLOTS)

    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            api.inspect(folder)
        assert "\n" not in str(caught.value)

    for changed, words in (
        (held[name][:, :-1], "rank 24, but tensor .* has shape"),
        (held[name][1:], "rank 24, but tensor .* has shape"),
        (held[name].float(), "is F32, not I16"),
        (None, "is missing"),
    ):
        others = {key: value for key, value in held.items() if key != name}
        new = {} if changed is None else {name: changed.contiguous()}
        save_file(others | new, tensors)
        refused(words)
    save_file(held, tensors)
    for shapes, words in (
        ([], "does not fit low_rank"),
        ({linear: [64, 64]}, "does not fit low_rank"),
        (sound["quantization_config"]["remapped"] | {linear: [64, True]}, "does not fit low_rank"),
        (sound["quantization_config"]["remapped"] | {linear: [64, 8]}, "inputs of a group differ"),
        (None, "I16, not floating point"),
    ):
        section = sound["quantization_config"] | {"remapped": shapes}
        config.write_text(json.dumps(sound | {"quantization_config": section}))
        refused(words)
    config.write_text(json.dumps(sound))
    check_model_folder(folder)


def test_a_tried_share_is_one_of_its_own_bytes(tmp_path: Path) -> None:
    """ASVD's trial of half of a 64 x 64 matrix is rank 32, where ordinary pairs' is 16."""
    (tmp_path / "model").mkdir()
    group = InputGroup(0, (Linear("x", 64, 64, False),))
    tensors = {"x.a": torch.ones(64, 64), "x.b": torch.ones(64, 64)}
    ranks = {}
    for layout in ("remapped", "factors"):
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.replace("remapped", layout))
        pairs = _pairs(load_recipe(path), group, tensors, (0.25, 0.5, 0.999))
        ranks[layout] = [pair.rank for pair in pairs]
    assert ranks == {"remapped": [16, 32, 63], "factors": [8, 16, 31]}


def test_other_exports_need_their_own_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for old, new, word in (
        ("remapped}]", "remapped}, {format: gguf, type: Q8_0}]", "of their own"),
        ("method: svd_llm", "method: emb_ae", "makes no pairs"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.replace(old, new))
        with pytest.raises(RecipeError, match=word):
            load_recipe(path)
