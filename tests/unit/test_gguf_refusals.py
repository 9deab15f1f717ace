"""What a GGUF export refuses or chooses before any conversion: bases, converters, places, mixes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from svdexport.checkpoint import Checkpoint, PairSpec
from svdexport.errors import InputError, MissingExtraError
from svdexport.export import gguf_base
from svdexport.export.gguf_base import Base, last_words
from svdexport.export.gguf_importance import NO_IMPORTANCE
from svdexport.export.gguf_layout import LayoutBuilder, PairPlace, a_stems, places_of
from svdexport.export.gguf_match import Match
from svdexport.export.gguf_plain import choose_mix
from svdexport.export.gguf_plan import Plan, changed_tensors
from svdexport.export.gguf_types import Types
from svdexport.runtimes.ggml_quantize import MIXES, quantized_bytes
from svdexport.runtimes.gguf_file import GgufFile
from tests.hostile.makers import gguf_bytes, gguf_text, gguf_u32
from tests.runtime.models import TinyModel, decoder
from tests.unit.gguf_models import save_checkpoint
from tests.unit.tiny_checkpoints import make_model

F32 = Types("F32", "F32", "F32", "F32", "F32")


def split_file(path: Path, count: int) -> Path:
    keys = [gguf_text("general.architecture", "llama"), gguf_u32("split.count", count)]
    path.write_bytes(gguf_bytes(keys))
    return path


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    part = split_file(tmp_path / "model-00001-of-00003.gguf", 3)
    with pytest.raises(InputError, match=r"of-00003\.gguf: one part of several; join them with"):
        gguf_base.prepare(tmp_path, part, tmp_path / "work")
    for count in (0, 1):
        whole = gguf_base.prepare(tmp_path, split_file(tmp_path / f"{count}.gguf", count), tmp_path)
        assert whole.given and whole.file.path == tmp_path / f"{count}.gguf"


def test_without_a_converter_the_user_is_told_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    monkeypatch.delenv(gguf_base.CONVERTER_VARIABLE, raising=False)
    assert gguf_base.converter().is_file()
    stock = tmp_path / "llama_cpp" / "__init__.py"
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "__file__", str(stock))
        expected = r"convert_hf_to_gguf\.py: missing; .* stock build .*make setup.*GGUF_CONVERTER"
        with pytest.raises(InputError, match=expected):
            gguf_base.converter()
        own = tmp_path / "own.py"
        own.touch()
        patch.setenv(gguf_base.CONVERTER_VARIABLE, str(own))
        assert gguf_base.converter() == own
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match="gguf"):
        gguf_base.converter()


@pytest.mark.parametrize("folder", [False, True], ids=["missing", "folder"])
def test_a_named_converter_that_is_no_file_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """The model is not to blame, and nothing is left behind."""
    make_model(tmp_path / "model", "llama")
    own = tmp_path / "own.py"
    if folder:
        own.mkdir()
    monkeypatch.setenv(gguf_base.CONVERTER_VARIABLE, str(own))
    with pytest.raises(InputError) as caught:
        gguf_base.prepare(tmp_path / "model", None, tmp_path / "work")
    assert str(caught.value) == (
        f"SVDEXPORT_GGUF_CONVERTER: {own} is not a file; set it to the path of llama.cpp's "
        "convert_hf_to_gguf.py, or unset it"
    )
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("", "refuses this model: no message"),
        ("import sys\nprint('# ---', file=sys.stderr)\nsys.exit('Nothing for it')", "Nothing for"),
        ("raise KeyError('odd')", "KeyError: 'odd'"),
    ],
    ids=["silent", "says why", "breaks"],
)
def test_a_converter_that_writes_nothing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """One that the user names in SVDEXPORT_GGUF_CONVERTER."""
    make_model(tmp_path / "model", "llama")
    own = tmp_path / "own.py"
    own.write_text(script)
    monkeypatch.setenv(gguf_base.CONVERTER_VARIABLE, str(own))
    with pytest.raises(InputError) as caught:
        gguf_base.prepare(tmp_path / "model", None, tmp_path / "work")
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: llama.cpp's converter refuses")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "work").iterdir()) == []


TRACE = """\
Traceback (most recent call last):
  File "x"
ValueError: odd
Writing: 10%|█   | 1/9 [0:01, 3.1it/s]
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "no message"),
        ("INFO:hf-to-gguf:Loading\nERROR:hf-to-gguf:X is not known\n", "X is not known"),
        ("ERROR:hf-to-gguf:first\nINFO:hf-to-gguf:cleaning up", "first"),
        (TRACE, "ValueError: odd"),
        ("INFO:hf-to-gguf:Set model\n=====\n", "Set model"),
    ],
)
def test_the_last_words_of_a_log_say_what_is_wrong(log: str, words: str) -> None:
    assert last_words(log) == words


def match_of(tensor: str, expert: int | None = None) -> Match:
    return Match(tensor, expert, None, False)


def test_a_pair_without_a_place_of_its_own_is_refused_by_name() -> None:
    q, head = match_of("blk.0.attn_q.weight"), match_of("token_embd.weight")
    with pytest.raises(InputError, match=r"^l\.k: its weight's rows are not found in the base"):
        places_of({"l.q": ["l.q", "l.k"]}, {"l.q.weight": q})
    matches = {"embed.weight": head, "lm_head.weight": head}
    with pytest.raises(InputError, match=r"^lm_head: token_embd\.weight holds another weight too"):
        places_of({"lm_head": ["lm_head"]}, matches)
    with pytest.raises(InputError, match=r"does not run blk\.0\.ffn_gate_inp\.weight as a pair"):
        places_of({"l.g": ["l.g"]}, {"l.g.weight": match_of("blk.0.ffn_gate_inp.weight")})
    # two experts of one tensor are two places
    experts = {f"e.{i}.weight": match_of("blk.0.ffn_up_exps.weight", i) for i in range(2)}
    assert [place.b for place in places_of({"e.0": ["e.0"]}, experts)] == [
        "blk.0.ffn_up_exps.lr_b.weight"
    ]


def test_members_of_a_group_find_their_a_under_one_name_where_there_is_one() -> None:
    q, k, v, gate, up, down = (
        f"blk.3.{name}" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    )
    qkv, both = "blk.3.attn_qkv", "blk.3.ffn_gate_up"
    assert a_stems([q, k, v]) == [qkv] * 3
    assert a_stems([k]) == [k] and a_stems([up]) == [up]
    assert a_stems([q, v]) == [qkv] * 2
    assert a_stems([q, k, v, gate, up]) == [qkv] * 3 + [both] * 2
    assert a_stems([q, k, up, down]) == [qkv, qkv, up, down]


def pair(linear: str, n_out: int, n_in: int, rank: int) -> dict[str, torch.Tensor]:
    return {
        f"{linear}.lr_a.weight": torch.ones(rank, n_in),
        f"{linear}.lr_b.weight": torch.ones(n_out, rank),
    }


def test_pairs_of_another_shape_than_their_place_are_refused(tmp_path: Path) -> None:
    base = GgufFile(
        TinyModel("llama", {}, {"blk.0.attn_q.weight": np.ones((12, 8))}).write(tmp_path / "b.gguf")
    )
    save_checkpoint(tmp_path / "c", {}, {"l.q": PairSpec(2, "l.q")}, pair("l.q", 8, 12, 2))
    places = places_of({"l.q": ["l.q"]}, {"l.q.weight": match_of("blk.0.attn_q.weight")})
    builder = LayoutBuilder(
        base, Checkpoint.open(tmp_path / "c"), F32, places, {}, NO_IMPORTANCE, {}
    )
    with pytest.raises(InputError, match=r"l\.q: a pair for 8 x 12, but blk\.0\.attn_q\.weight is"):
        builder.build()


def test_experts_of_several_ranks_are_refused(tmp_path: Path) -> None:
    name = "blk.0.ffn_up_exps.weight"
    base = GgufFile(TinyModel("llama", {}, {name: np.ones((2, 12, 8))}).write(tmp_path / "b.gguf"))
    tensors = pair("e.0", 12, 8, 2) | pair("e.1", 12, 8, 3)
    specs = {f"e.{i}": PairSpec(2 + i, f"e.{i}") for i in range(2)}
    save_checkpoint(tmp_path / "c", {}, specs, tensors)
    checkpoint = Checkpoint.open(tmp_path / "c")
    matches = {f"e.{i}.weight": match_of(name, i) for i in range(2)}
    places = places_of(checkpoint.groups, matches)
    builder = LayoutBuilder(base, checkpoint, F32, places, {}, NO_IMPORTANCE, {})
    with pytest.raises(InputError, match=r"e\.[01]: the experts of a layer must have one rank"):
        builder.build()


def test_what_differs_from_the_model_and_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    weight = torch.arange(96.0).reshape(12, 8)
    tensors = {"blk.0.attn_q.weight": weight.numpy()}
    base = GgufFile(TinyModel("llama", {}, tensors).write(tmp_path / "b.gguf"))
    linear, match = "model.layers.0.self_attn.q_proj", match_of("blk.0.attn_q.weight")
    place = PairPlace(linear, linear, "blk.0.attn_q.lr_a.weight", "blk.0.attn_q.lr_b.weight", match)
    plan = Plan(Base(base, False, ""), {f"{linear}.weight": match}, [place])
    source = {f"{linear}.weight": weight, "model.norm.weight": torch.ones(8)}
    save_checkpoint(tmp_path / "source", {}, {}, source)
    norm = {"model.norm.weight": torch.ones(8)}
    specs = {linear: PairSpec(2, linear)}
    for name, more, words in (
        ("bias", {f"{linear}.bias": torch.ones(12)}, "a bias that the model does not have"),
        ("norm", {"model.norm.weight": torch.zeros(8)}, "differs from the original model's"),
        ("new", {"model.extra.weight": torch.ones(3, 8)}, "is not found in the base GGUF"),
    ):
        save_checkpoint(tmp_path / name, {}, specs, pair(linear, 12, 8, 2) | norm | more)
        with pytest.raises(InputError, match=f"{next(iter(more))}: .*{words}"):
            changed_tensors(Checkpoint.open(tmp_path / name), tmp_path / "source", plan)
    save_checkpoint(tmp_path / "same", {}, specs, pair(linear, 12, 8, 2) | norm)
    assert changed_tensors(Checkpoint.open(tmp_path / "same"), tmp_path / "source", plan) == {}


def test_the_mix_comes_nearest_from_below_or_is_the_smallest(tmp_path: Path) -> None:
    file = decoder(width=256, hidden=512).write(tmp_path / "base.gguf")
    sizes = {mix: quantized_bytes(file, mix) for mix in MIXES}
    smallest, largest = min(sizes.values()), max(sizes.values())
    assert smallest < sizes["Q4_K_M"] < largest
    for most in (0, smallest - 1, smallest):
        assert sizes[choose_mix(file, most)] == smallest
    for most, expected in (
        (sizes["Q4_K_M"], sizes["Q4_K_M"]),
        (sizes["Q4_K_M"] - 1, max(s for s in sizes.values() if s < sizes["Q4_K_M"])),
        (largest, largest),
        (10 * largest, largest),
    ):
        assert sizes[choose_mix(file, most)] == expected
