"""Mixtures of experts: every expert's linears are found, calibrated, compressed and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from svdexport import api
from svdexport.allocate import Allocation, Candidate
from svdexport.checkpoint import Checkpoint, module_name
from svdexport.core.moments import Fisher, MeanAbs, Moment
from svdexport.errors import RecipeError
from svdexport.export import gguf
from svdexport.export.gguf_importance import read_importance
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_packed import ready_tensors
from svdexport.export.gguf_write import Planned, write
from svdexport.models.blocks import InputGroup, Linear, discover, select
from svdexport.models.experts import Experts, separate_experts
from svdexport.models.loader import load_model, structure_of
from svdexport.models.routed import Collected, borrow
from svdexport.models.shapes import shapes_of
from svdexport.models.weights import StreamedWeights
from svdexport.packed import PackedFolder, PackedWeight, write_packed
from svdexport.pipeline.compress import one_rank_a_stack
from svdexport.pipeline.factors import chosen_groups
from svdexport.pipeline.sizes import weight_bytes
from svdexport.recipe import GgufExport, load_recipe
from svdexport.runtimes.ggml import quantize
from svdexport.runtimes.gguf_file import GgufFile
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from tests.unit.gguf_models import WORDS, export, make_model, torch_logits, work_of
from tests.unit.test_gguf_architectures import MODELS, TOKENS

RECIPE = """\
schema: 1
model: {{path: {model}}}
calibration: {{source: file, file: {text}, samples: 8, length: 48, seed: 1}}
compress: {{method: kfac_svd, budget: {{param_ratio: 0.7}}, rank_multiple: 8{more}}}
export: [{{format: gguf, type: F32}}]
evaluate: {{text: {text}, context: 48, windows: 2}}
"""


def write_recipe(root: Path, more: str = "") -> Path:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS.split())) for _ in range(200)]
    (root / "text.txt").write_text("\n".join(lines))
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=root / "source", text=root / "text.txt", more=more))
    return recipe


@pytest.fixture(scope="module", params=["mixtral", "qwen2moe"])
def compressed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder of a small mixture, and its compressed checkpoint."""
    root = tmp_path_factory.mktemp(request.param)
    model, config, _ = MODELS[request.param]
    source = make_model(root / "source", model, **config)
    return source, api.compress(write_recipe(root), root / "out")


def test_experts_apart_compute_what_the_stack_computes(compressed: tuple[Path, Path]) -> None:
    source, _ = compressed
    stacked = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    meant = torch_logits(stacked, TOKENS)
    separate_experts(stacked)
    mixtures = [m for m in stacked.modules() if isinstance(m, Experts)]
    assert len(mixtures) == 2 and len(mixtures[0]) == 4
    assert np.abs(torch_logits(stacked, TOKENS) - meant).max() < 1e-5 * np.ptp(meant)
    for mixture in mixtures:
        mixture.every = True
    assert np.abs(torch_logits(stacked, TOKENS) - meant).max() < 1e-5 * np.ptp(meant)


def test_a_mixture_runs_as_stacked_pairs(compressed: tuple[Path, Path], tmp_path: Path) -> None:
    """All experts of a stack have one rank; the GGUF computes what the checkpoint does in torch."""
    source, folder = compressed
    opened = Checkpoint.open(folder)
    experts = [name for name in opened.low_rank if ".experts." in name]
    assert len(experts) == 2 * 3 * 4
    ranks: dict[str, set[int]] = {}
    for name in experts:
        layer, _, role = name.rsplit(".", 2)
        ranks.setdefault(f"{layer}.{role}", set()).add(opened.low_rank[name].rank)
    assert len(ranks) == 6 and all(len(found) == 1 for found in ranks.values())

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    meant = torch_logits(reference, TOKENS)
    for type_name in ("F32", "F16"):
        made = export(folder, source, tmp_path / f"{type_name}.gguf", type=type_name)
        rank = ranks["model.layers.1.mlp.experts.down_proj"].pop()
        shape = made.tensors["blk.1.ffn_down_exps.lr_b.weight"].shape
        assert shape == (rank, 64, 4)
        ranks["model.layers.1.mlp.experts.down_proj"].add(rank)
        runtime = LlamaCppRuntime(made.path, threads=1, context=64, exact=True)
        found = runtime.logits(TOKENS)
        runtime.close()
        if type_name == "F32":
            assert np.abs(found - meant).max() < 1e-3 * np.ptp(meant)
            assert (found.argmax(1) == meant.argmax(1)).all()
        else:  # rounding may send a token to another expert
            assert np.sqrt(((found - meant) ** 2).mean()) < 0.02 * meant.std()
        assert gguf.check_round_trip(made.path, made.tensors) == []
    keys = set()
    values = gguf.read_back(tmp_path / "F32.gguf", opened, source, None, work_of(source))
    for key, value in values:
        assert np.array_equal(value, opened.tensor(key).float().numpy()), key
        keys.add(key)
    assert {f"{name}.lr_b.weight" for name in experts} < keys


@pytest.mark.parametrize("form", ["stock", "stock_lora"])
def test_forms_of_a_mixture_for_a_stock_llama_cpp(
    form: str, compressed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, folder = compressed
    made = export(folder, source, tmp_path / "out.gguf", type="F32", form=form)
    meant = torch_logits(load_model(folder if form == "stock" else source), TOKENS)
    runtime = LlamaCppRuntime(made.path, threads=1, context=64, exact=True)
    found = runtime.logits(TOKENS)
    runtime.close()
    assert np.abs(found - meant).max() < 1e-3 * np.ptp(meant)


def test_a_streamed_mixture_is_the_loaded_one(compressed: tuple[Path, Path]) -> None:
    for folder in compressed:
        meant = torch_logits(load_model(folder), TOKENS)
        with StreamedWeights(folder, ()).on_call() as streamed:
            assert np.array_equal(torch_logits(streamed, TOKENS), meant)


def test_experts_are_found_whatever_the_router_chooses(compressed: tuple[Path, Path]) -> None:
    source, _ = compressed
    structure = structure_of(source)
    assert structure == discover(load_model(source))
    groups = select(structure, ["re:"], [], group=True)
    experts = [group for group in groups if group.stack]
    assert len(experts) == 2 * 3 * 4 and all(len(group.members) == 1 for group in experts)
    assert experts[0].stack == "model.layers.0.mlp.experts.gate_proj"
    assert not any(name.name.endswith("_gate") for g in groups for name in g.members)
    inputs = [g for g in structure.groups if g.leader.endswith("experts.3.gate_proj")]
    assert [len(group.members) for group in inputs] == [2, 2]  # gate and up share their moment


def test_the_plan_foretells_a_mixtures_bytes(compressed: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = compressed
    spec, pairs = GgufExport(type="Q8_0"), Checkpoint.open(folder).low_rank
    shapes = shapes_of(source)
    groups = select(shapes.structure, ["re:"], [], group=True)
    ranks = {g.leader: pairs[g.leader].rank if g.leader in pairs else None for g in groups}
    chosen = {leader: Allocation(rank) for leader, rank in ranks.items()}
    foretold = weight_bytes(spec, shapes, groups, chosen, "float32")
    made = export(folder, source, tmp_path / "out.gguf", type="Q8_0")
    written = [  # but copies of the shared expert's A, which has no shared name in llama.cpp
        record.nbytes for name, record in made.tensors.items() if "ffn_up_shexp.lr_a" not in name
    ]
    assert foretold == sum(-(-size // 32) * 32 for size in written)


def test_few_tokens_borrow_the_moment_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 6, generator=generator) for count in (40, 3, 0)]
    gradients = [torch.randn(len(x), 4, generator=generator) for x in rows]
    groups = [
        InputGroup(0, (Linear(f"experts.{i}.up", 4, 6, False, "experts.up"),)) for i in range(3)
    ]
    found = Collected()
    for group, x, g in zip(groups, rows, gradients, strict=True):
        name = group.leader
        found.inputs[name], found.gradients[name] = Moment(6), Moment(4)
        found.sampled_gradients[name] = Moment(4)
        found.mean_abs[name], found.fisher[name] = MeanAbs(6), Fisher(4, 6)
        for statistic in (found.inputs[name], found.mean_abs[name]):
            statistic.add(x)
        found.gradients[name].add(g)
        found.sampled_gradients[name].add(2 * g)
        if len(x):
            found.fisher[name].add(x[None], g[None])
    fisher = sum(one.matrix for one in found.fisher.values())
    assert borrow(groups, found) == {"experts.1.up": 3, "experts.2.up": 0}
    x, g = torch.cat(rows).double(), torch.cat(gradients).double()
    for name, share in (("experts.1.up", 3 / 43), ("experts.2.up", 1 / 43)):
        assert torch.allclose(found.inputs[name].matrix, share * x.T @ x, atol=1e-5)
        assert torch.allclose(found.gradients[name].matrix, share * g.T @ g, atol=1e-5)
        sampled = found.sampled_gradients[name].matrix
        assert torch.allclose(sampled, 4 * share * g.T @ g, atol=1e-5)
        assert torch.allclose(found.fisher[name].matrix, share * fisher)
        assert torch.allclose(found.mean_abs[name].value(), x.abs().mean(0))
    own = rows[0].double()
    assert torch.allclose(found.inputs["experts.0.up"].matrix, own.T @ own, atol=1e-5)
    assert len(found.all()) == 15


def test_a_stack_is_one_candidate() -> None:
    energies = [np.array([9.0, 4.0, 1.0]), np.array([5.0, 5.0, 0.0])]
    items = [
        Candidate(f"e.{i}.up", 20, 10, e, position=3.0 + i, trials=((0.5, 8.0 - i), (0.9, 7.0 + i)))
        for i, e in enumerate(energies)
    ]
    alone = Candidate("q", 10, 10, np.ones(3))
    stack = {"e.0.up": "e.up", "e.1.up": "e.up", "q": "q"}
    merged, same = one_rank_a_stack([*items, alone], stack)
    assert same is alone
    assert (merged.name, merged.count, merged.position) == ("e.up", 2, 4.0)
    assert merged.trials == ((0.5, 8.0), (0.9, 8.0))
    assert np.array_equal(merged.energies, [14.0, 9.0, 1.0])
    assert merged.dense_params == 400 and merged.cost(4) == 2 * 4 * 30


def test_a_stack_is_quantised_slice_by_slice_with_its_experts_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 32)).astype(np.float32)
    squares = rng.exponential(1, (3, 32)).astype(np.float32)
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    given = {f"{name}.inputs": x for name, x in zip(names, squares, strict=True)}
    save_file(given, tmp_path / "importance.safetensors")
    tensor = "blk.0.ffn_up_exps.weight"
    stored = [f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight" for i in (2, 0, 1)]
    matches = {n: Match(tensor, i, None, False) for n, i in zip(stored, (2, 0, 1), strict=True)}
    importance = read_importance(tmp_path, matches)
    weights = importance.of_tensor(tensor)
    assert weights is not None and np.allclose(weights, squares / squares.mean(1)[:, None])
    assert np.array_equal(importance.of_first(names), weights)
    assert importance.of_first([*names, "another"]) is None
    planned = Planned(tensor, (32, 2, 3), "Q4_0", lambda: rows, weights)
    write(tmp_path / "out.gguf", [], [planned], 32)
    own = [quantize(rows[2 * i : 2 * i + 2], "Q4_0", weights[i]) for i in range(3)]
    assert np.array_equal(GgufFile(tmp_path / "out.gguf").raw(tensor), np.concatenate(own))


def test_packed_slices_make_a_stack(tmp_path: Path) -> None:
    data = np.arange(3 * 2 * 18, dtype=np.uint8).reshape(3, 2, 18)
    order = np.array([1, 0])
    packed = {f"e.{i}.up.weight": PackedWeight("Q4_0", {"data": data[i]}) for i in range(3)}
    write_packed(tmp_path / "block.safetensors", packed)
    matches = {name: Match("exps", i, order, False) for i, name in enumerate(packed)}
    (ready,) = ready_tensors(PackedFolder.open(tmp_path), matches, []).items()
    assert ready[0] == "exps" and ready[1].type == "Q4_0"
    assert np.array_equal(ready[1].rows(), data[:, ::-1].reshape(6, 18))
    matches["e.3.up.weight"] = Match("exps", 3, None, False)  # not packed: nor is the stack then
    assert ready_tensors(PackedFolder.open(tmp_path), matches, []) == {}


def test_slices_packed_by_their_modules_are_found_for_mixtrals_tensors(tmp_path: Path) -> None:
    data = np.arange(3 * 2 * 18, dtype=np.uint8).reshape(3, 2, 18)
    names = [f"l.0.mlp.experts.{i}.up_proj.weight" for i in range(3)]
    packed = {n: PackedWeight("Q4_0", {"data": d}) for n, d in zip(names, data, strict=True)}
    write_packed(tmp_path / "block.safetensors", packed)
    stored = [f"l.0.block_sparse_moe.experts.{i}.w3.weight" for i in range(3)]
    matches = {name: Match("exps", i, None, False) for i, name in enumerate(stored)}
    ready = ready_tensors(PackedFolder.open(tmp_path), matches, [])
    assert np.array_equal(ready["exps"].rows(), data.reshape(6, 18))


def test_tensors_of_mixtral_by_their_modules() -> None:
    assert module_name("l.0.block_sparse_moe.experts.12.w3.weight") == (
        "l.0.mlp.experts.12.up_proj.weight"
    )
    assert module_name("l.0.block_sparse_moe.gate.weight") == "l.0.mlp.gate.weight"
    assert module_name("l.0.mlp.experts.1.gate_proj.weight") == "l.0.mlp.experts.1.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("compress.sequential=true", r"compress\.sequential"),
        ("refine.method=sequential_ls", "refine sequential_ls"),
        ("quantize.sequential=true", r"quantize\.sequential"),
    ],
)
def test_experts_in_sequence_are_refused(
    compressed: tuple[Path, Path], change: str, named: str
) -> None:
    """The compressed model may send a token to other experts than the original does."""
    source, _ = compressed
    path = source.parent / "quantised.yaml"
    path.write_text((source.parent / "recipe.yaml").read_text().replace("type: F32", "type: Q8_0"))
    recipe = load_recipe(path, [change])
    with pytest.raises(RecipeError, match=f"{named}: cannot be used on the experts"):
        chosen_groups(recipe, structure_of(source))
