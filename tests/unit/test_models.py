"""Structure, calibration and the low-rank modules on tiny random models of several families."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

import svdexport  # noqa: F401 (registers the quantizer)
from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.core.moments import FirstRows
from svdexport.core.ranks import Ranks
from svdexport.errors import InputError
from svdexport.export.checkpoint import assembled, compressed_config, write_checkpoint
from svdexport.models import blocks as blocks_module
from svdexport.models.blocks import (
    _twins,
    discover,
    find_blocks,
    record_inputs,
    run_block,
    select,
)
from svdexport.models.calibrate import _by_sample, calibrate
from svdexport.models.decoder import Decoder
from svdexport.models.experts import separate_experts
from svdexport.models.hf import LowRankConfig, LowRankQuantizer
from svdexport.models.loader import both_rope_forms, load_model, structure_of
from svdexport.models.modules import linear_weight

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | more))).eval().requires_grad_(False)


def qwen2() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval().requires_grad_(False)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


TOKENS = torch.randint(1, 96, (6, 10), generator=torch.Generator().manual_seed(0))


def leaf_names(names: list[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


def test_linears_that_share_an_input_are_found_by_running() -> None:
    structure = discover(llama())
    groups = [leaf_names([m.name for m in g.members]) for g in structure.of_block(1)]
    assert groups == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    gpt = discover(gpt2())
    assert [m.name for m in gpt.of_block(0)[0].members] == ["transformer.h.0.attn.c_attn"]
    assert (gpt.of_block(0)[0].members[0].out_features, 32) == (96, 32)


OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt, projected": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {"n_layer": 3, "n_head": 4},
    "phi3": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt_neox": {},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, one key": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
}


@pytest.mark.parametrize("family", list(OTHERS))
def test_other_families_run_block_by_block(family: str) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    config = AutoConfig.for_model(family.partition(",")[0], **(sizes | OTHERS[family]))
    with torch.device("meta"):
        structure = discover(AutoModelForCausalLM.from_config(config).eval())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert structure == discover(model)
    assert len(structure.blocks) == 3
    decoder = Decoder(model, structure)
    found = decoder.logits(TOKENS, decoder.hidden(TOKENS))
    assert torch.equal(found, model(input_ids=TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("family", [*OTHERS, "llama", "gpt2", "qwen2_moe"])
def test_blocks_alike_run_once_and_nothing_is_lost(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**SIZES, "num_hidden_layers": 7, "n_layer": 7, "moe_intermediate_size": 16}
    sizes |= {"mlp_only_layers": [2], "num_experts": 4}  # of the mixture one layer is plain
    config = AutoConfig.for_model(family.partition(",")[0], **(sizes | OTHERS.get(family, {})))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    separate_experts(model)
    structure = discover(model)
    kinds = set(_twins(model, structure.blocks))
    assert kinds == {"gemma2": {0, 1}, "gemma3_text": {0, 5}, "qwen2_moe": {0, 2}}.get(family, {0})
    assert not any("forward" in module.__dict__ for module in model.modules())
    monkeypatch.setattr(blocks_module, "_twins", lambda _model, blocks: list(range(len(blocks))))
    assert structure == discover(model)


def test_structure_needs_no_weights(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    assert structure_of(tmp_path) == discover(llama())


def test_select_by_patterns() -> None:
    structure = discover(llama())
    groups = select(structure, ("re:mlp",), ("re:down",), group=True)
    assert {leaf for g in groups for leaf in leaf_names([m.name for m in g.members])} == {
        "gate_proj",
        "up_proj",
    }
    apart = select(structure, ("re:mlp",), (), group=False)
    assert all(len(g.members) == 1 for g in apart)
    with pytest.raises(InputError, match="leave no linear"):
        select(structure, ("nothing",), (), group=True)


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_blocks_run_one_by_one_give_the_models_logits(make: Any) -> None:
    model = make()
    structure = discover(model)
    inputs = record_inputs(model, structure, TOKENS)
    states = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    hidden = inputs.hidden
    with torch.no_grad():
        for index, path in enumerate(find_blocks(model)):
            assert torch.allclose(hidden, states[index], atol=1e-5)
            hidden = run_block(model.get_submodule(path), hidden, inputs.calls[index])


def direct_moments(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Moments of a plain forward and backward pass of the whole model in float64."""
    model = model.double()
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    hooks = []
    for group in discover(model).groups:
        for member in group.members:

            def note(_m: Any, args: Any, out: Tensor, name: str = member.name) -> None:
                rows = args[0].detach().flatten(0, 1)
                inputs[name] = rows.T @ rows

                def grad(g: Tensor) -> None:
                    flat = g.flatten(0, 1)
                    gradients[name] = flat.T @ flat

                out.register_hook(grad)

            hooks.append(model.get_submodule(member.name).register_forward_hook(note))
    model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(TOKENS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    for hook in hooks:
        hook.remove()
    return inputs, gradients


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
@pytest.mark.parametrize("gradients", [False, True])
def test_moments_of_streaming_are_those_of_one_pass(
    make: Any, gradients: bool, tmp_path: Path
) -> None:
    model = make()
    structure = discover(model)
    expected_inputs, expected_gradients = direct_moments(make())
    found = list(
        calibrate(
            model,
            structure,
            TOKENS,
            batch=4,
            statistics={"gradients"} if gradients else (),
            scratch=tmp_path,
        )
    )
    order = [moments.block for moments in found]
    assert order == ([2, 1, 0] if gradients else [0, 1, 2])
    for moments in found:
        for name, moment in moments.inputs.items():
            expected = expected_inputs[name]
            assert torch.allclose(moment.matrix, expected, atol=1e-4 * float(expected.max()))
        for name, moment in moments.gradients.items():
            expected = expected_gradients[name]
            assert torch.allclose(moment.matrix, expected, atol=1e-4 * float(expected.max()))
        assert bool(moments.gradients) == gradients
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gradients", [False, True])
def test_moments_of_a_bfloat16_model_are_not_summed_in_bfloat16(
    gradients: bool, tmp_path: Path
) -> None:
    """The inputs are rounded, their moment is not: rounded sums make small eigenvalues negative."""
    wanted: Any = {"inputs", "rows"} | ({"gradients"} if gradients else set())
    model = llama()
    found = calibrate(
        model,
        discover(model),
        TOKENS,
        batch=4,
        statistics=wanted,
        scratch=tmp_path,
        keep_rows=TOKENS.numel(),
        precision="bfloat16",
    )
    rounded = 0
    for moments in found:
        for name, moment in moments.inputs.items():
            rows = moments.rows[name].double()
            exact = rows.T @ rows
            scale = exact.diagonal().sqrt()
            assert ((moment.matrix - exact).abs() <= 1e-6 * scale[:, None] * scale).all()
            rounded += bool((rows == rows.bfloat16().double()).all())
    assert rounded  # the model did multiply in bfloat16


def opt() -> Any:
    """Its feed-forward layers are given all samples' tokens as rows of one matrix."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    config = AutoConfig.for_model("opt", **(sizes | OTHERS["opt"]))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_fisher_mean_abs_and_similarity_of_streaming_are_those_of_one_pass(
    make: Any, tmp_path: Path
) -> None:
    model = make().double()
    structure = discover(model)
    seen: dict[str, Tensor] = {}
    for linear in structure.linears():

        def note(_m: Any, args: Any, _o: Any, name: str = linear.name) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            seen.setdefault(name, rows.abs().mean(dim=0))  # the first pass, of all samples

        model.get_submodule(linear.name).register_forward_hook(note)
    states = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    squares: dict[str, Tensor] = {}
    model.requires_grad_(True)
    for sample in TOKENS:  # one sequence at a time, by torch's own gradients of the weights
        model.zero_grad()
        logits = model(sample[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], sample[1:], reduction="sum").backward()
        for linear in structure.linears():
            module = model.get_submodule(linear.name)
            gradient = module.weight.grad.square()
            gradient = gradient.T if type(module).__name__ == "Conv1D" else gradient
            squares[linear.name] = squares.get(linear.name, 0) + gradient
    wanted: Any = {"fisher", "mean_abs", "similarity"}
    found = calibrate(make(), structure, TOKENS, batch=4, statistics=wanted, scratch=tmp_path)
    for moments in found:
        assert not moments.gradients
        for name, fisher in moments.fisher.items():
            assert torch.allclose(fisher, squares[name], atol=1e-4 * float(squares[name].max()))
            assert torch.allclose(moments.mean_abs[name], seen[name], atol=1e-5)
        if moments.block == 0:
            assert moments.similarity == pytest.approx(float(cosine), abs=1e-5)


def test_rows_of_some_tokens_are_one_sample() -> None:
    batch = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(_by_sample(batch.flatten(0, 1), batch.shape[:2]), batch)
    assert _by_sample(batch, batch.shape[:2]) is batch
    assert torch.equal(_by_sample(batch[1, :3], batch.shape[:2]), batch[1:, :3])


class Threads(Ranks):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, barrier: threading.Barrier, box: dict[int, Tensor]) -> None:
        super().__init__(rank, barrier.parties)
        self.barrier, self.box = barrier, box

    def sum(self, values: Tensor) -> Tensor:
        self.box[self.rank] = values.clone()
        self.barrier.wait(60)
        total = torch.stack([self.box[i] for i in range(self.size)]).sum(dim=0)
        self.barrier.wait(60)
        return values.copy_(total)


@pytest.mark.parametrize("count", [5, 30, 100])
def test_the_first_rows_of_several_processes_are_those_of_one(count: int) -> None:
    batches = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    batches = [batch[: 2 - i % 2] for i, batch in enumerate(batches)]  # some calls have fewer rows
    parts = [FirstRows(count, 3) for _ in range(4)]
    for number, batch in enumerate(batches):
        for one in (parts[number % 3], parts[3]):
            one.sample = 2 * number
            if number != 1:  # an expert that no token of the batch goes to
                one.add(batch)
    barrier, box = threading.Barrier(3), dict[int, Tensor]()
    ranks = [Threads(rank, barrier, box) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: parts[one.rank].share(one), ranks))
    for one in parts:
        assert torch.equal(one.value(), parts[3].value())
        assert one.rows == parts[3].rows == min(count, 28)


def test_shared_inputs_are_accumulated_once() -> None:
    model = llama()
    structure = discover(model)
    for moments in calibrate(model, structure, TOKENS, batch=6, statistics=(), scratch=Path()):
        group = structure.of_block(moments.block)[0]
        assert len({id(moments.inputs[m.name]) for m in group.members}) == 1
        assert moments.inputs[group.leader].rows == TOKENS.numel()


def pairs_of(model: Any, rank: int) -> tuple[dict[str, PairSpec], dict[str, Tensor]]:
    """Every group as a pair with a shared A, by a plain SVD."""
    low_rank: dict[str, PairSpec] = {}
    tensors: dict[str, Tensor] = {}
    for group in discover(model).groups:
        weights = [linear_weight(model.get_submodule(m.name)) for m in group.members]
        u, s, vt = torch.linalg.svd(torch.cat(weights).double(), full_matrices=False)
        tensors[f"{group.leader}.lr_a.weight"] = vt[:rank].float().contiguous()
        stacked = (u[:, :rank] * s[:rank]).float()
        parts = torch.split(stacked, [m.out_features for m in group.members])
        for member, part in zip(group.members, parts, strict=True):
            tensors[f"{member.name}.lr_b.weight"] = part.contiguous()
            low_rank[member.name] = PairSpec(rank, group.leader)
    return low_rank, tensors


@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_compressed_checkpoint_loads_with_from_pretrained(make: Any, tmp_path: Path) -> None:
    model = make()
    source, out = tmp_path / "source", tmp_path / "compressed"
    model.save_pretrained(source)
    low_rank, pairs = pairs_of(model, 8)
    dense = Checkpoint.open(source)
    config = both_rope_forms(compressed_config(dense.config, low_rank))
    records = write_checkpoint(out, source, config, assembled(dense, low_rank, [pairs]))

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for name, spec in low_rank.items():
        weight = pairs[f"{name}.lr_b.weight"] @ pairs[f"{spec.group}.lr_a.weight"]
        model.get_submodule(name).weight.data = weight
    expected, found = model(TOKENS).logits, loaded(TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    one = loaded.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    two = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert one.tolist() == two.tolist()

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    resaved = Checkpoint.open(again)
    assert resaved.low_rank == low_rank
    assert set(resaved.names()) == set(records)
    reloaded = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).eval()
    assert torch.equal(reloaded(TOKENS).logits, found)


def test_the_quantizers_hook_takes_what_older_releases_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers 5.17 has (weight_conversions); 5.23 a model after it."""
    given: list[Any] = ["conversion"]
    quantizer = LowRankQuantizer(LowRankConfig(low_rank={"a": {"rank": 8, "group": "a"}}))
    assert quantizer.update_weight_conversions(given, torch.nn.Identity()) == given
    parent = LowRankQuantizer.__mro__[1]
    monkeypatch.setattr(parent, "update_weight_conversions", lambda _, conversions: conversions)
    assert quantizer.update_weight_conversions(given) == given


def test_configs_carry_both_rope_forms() -> None:
    new = both_rope_forms({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert new["rope_theta"] == 5e5
    scaled = both_rope_forms(
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    )
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_wrong_name_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = compressed_config(config, {"model.layers.0.nothing": PairSpec(4, "x")})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.layers\.0\.nothing"):
        load_model(tmp_path)
