"""The content proof: where in a GGUF each Hugging Face matrix stands, and in which row order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from svdexport.export import gguf_match
from svdexport.export.gguf_match import ContentIndex, Match
from svdexport.runtimes.gguf_file import GgufFile
from tests.runtime.models import Tensors, TinyModel

ROWS, COLUMNS = 8, 12
BACKWARDS = np.arange(ROWS)[::-1]
SHIFTED = np.roll(np.arange(ROWS), 3)


def matrix(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, COLUMNS)).astype(np.float32)


def found(
    tmp_path: Path, file: Tensors, folder: dict[str, np.ndarray], dtype: str | None = None
) -> dict[str, Match]:
    """The matches of a folder's matrices in a file of these tensors, each of which must give the
    file's rows and take them back."""
    path = TinyModel("llama", {}, file).write(tmp_path / "base.gguf")
    matches = ContentIndex(GgufFile(path), dtype).find(folder.items())
    for name, match in matches.items():
        there = file[match.tensor] if match.expert is None else file[match.tensor][match.expert]
        mine = folder[name].T if match.transposed else folder[name]
        if dtype is None:
            assert np.array_equal(match.to_file(mine), there)
        assert np.array_equal(match.from_file(match.to_file(mine)), mine)
    return matches


def test_copied_layers_go_by_their_number(tmp_path: Path) -> None:
    """Layers that were copied hold equal matrices, in whatever order the folder lists them."""
    up = matrix(0)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (2, 0, 1)]
    file = {f"blk.{layer}.ffn_up.weight": up for layer in (1, 2, 0)}
    matches = found(tmp_path, file, dict.fromkeys(names, up))
    assert {name: match.tensor for name, match in matches.items()} == {
        f"model.layers.{layer}.mlp.up_proj.weight": f"blk.{layer}.ffn_up.weight"
        for layer in range(3)
    }
    assert all(match.sure and match.order is None for match in matches.values())


def test_equal_experts_go_by_their_slice(tmp_path: Path) -> None:
    same, other = matrix(0), matrix(1)
    file = {f"blk.{layer}.ffn_up_exps.weight": np.stack([same, other, same]) for layer in range(2)}
    folder = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": (same, other, same)[expert]
        for layer in (1, 0)
        for expert in (2, 1, 0)
    }
    matches = found(tmp_path, file, folder)
    places = {name: (match.tensor, match.expert) for name, match in matches.items()}
    assert places == {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": (
            f"blk.{layer}.ffn_up_exps.weight",
            expert,
        )
        for layer in range(2)
        for expert in range(3)
    }


def test_what_fits_twice_in_one_layer_is_not_guessed(tmp_path: Path) -> None:
    same = matrix(0)
    file = {f"blk.0.{name}.weight": same for name in ("ffn_up", "ffn_gate")}
    assert found(tmp_path, file, {"model.layers.0.mlp.up_proj.weight": same}) == {}


@pytest.mark.parametrize("order", [BACKWARDS, SHIFTED], ids=["as the other", "its own"])
def test_rows_that_repeat_take_the_order_of_another_block_where_it_fits(
    tmp_path: Path, order: np.ndarray
) -> None:
    first, second = matrix(0), matrix(1)
    second[5] = second[2]
    file = {
        "blk.0.attn_q.weight": first[BACKWARDS],
        "blk.1.attn_q.weight": second[order],
    }
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    matches = found(tmp_path, file, dict(zip(names, (first, second), strict=True)))
    assert [matches[name].tensor for name in names] == list(file)
    settled, repeated = (matches[name] for name in names)
    assert settled.sure and settled.order is not None and repeated.order is not None
    assert np.array_equal(settled.order, BACKWARDS)
    assert sorted(repeated.order) == list(range(ROWS))
    if order is BACKWARDS:  # of the two equal rows the later one first, as in the other block
        assert repeated.sure and np.array_equal(repeated.order, BACKWARDS)
    else:
        assert not repeated.sure
        different = ~np.isin(SHIFTED, (2, 5))
        assert np.array_equal(repeated.order[different], SHIFTED[different])


def test_rows_that_repeat_alone_fit_in_any_order(tmp_path: Path) -> None:
    repeated = matrix(0)
    repeated[5] = repeated[2]
    name = "model.layers.0.self_attn.q_proj.weight"
    match = found(tmp_path, {"blk.0.attn_q.weight": repeated[SHIFTED]}, {name: repeated})[name]
    assert not match.sure and match.order is not None
    same = found(tmp_path, {"blk.0.attn_q.weight": repeated}, {name: repeated})[name]
    assert not same.sure and same.order is None


def test_a_transposed_matrix_and_both_zeros_are_found_and_a_changed_one_is_not(
    tmp_path: Path,
) -> None:
    stored, zeros, changed = matrix(0), matrix(1), matrix(2)
    zeros[3, 4] = 0.0
    negative = zeros.copy()
    negative[3, 4] = -0.0
    other = changed.copy()
    other[7, 11] = np.nextafter(other[7, 11], np.float32(9))
    file = {"blk.0.attn_qkv.weight": stored, "blk.0.ffn_up.weight": zeros, "output.weight": changed}
    folder = {
        "h.0.attn.c_attn.weight": np.ascontiguousarray(stored.T),
        "h.0.mlp.up.weight": negative,
        "lm_head.weight": other,
    }
    matches = found(tmp_path, file, folder)
    assert {name: (m.tensor, m.transposed) for name, m in matches.items()} == {
        "h.0.attn.c_attn.weight": ("blk.0.attn_qkv.weight", True),
        "h.0.mlp.up.weight": ("blk.0.ffn_up.weight", False),
    }


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_folder_made_from_the_file_is_found_as_it_was_rounded(tmp_path: Path, dtype: str) -> None:
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    values = matrix(0)
    rounded = torch.from_numpy(values).to(kind).float().numpy()
    assert not np.array_equal(rounded, values)
    file, name = {"blk.0.ffn_up.weight": values}, "model.layers.0.mlp.up_proj.weight"
    assert list(found(tmp_path, file, {name: rounded}, dtype)) == [name]
    assert found(tmp_path, file, {name: rounded}) == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rows_that_cannot_be_written_are_rounded_without_a_warning(
    tmp_path: Path, dtype: str
) -> None:
    """Those of an F32 file are views of its map. torch warns of them once a process, if at all."""
    path = TinyModel("llama", {}, {"blk.0.ffn_up.weight": matrix(0)}).write(tmp_path / "base.gguf")
    rows = GgufFile(path).rows("blk.0.ffn_up.weight")
    assert not rows.flags.writeable
    warns_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        found = gguf_match.rounded(rows, dtype)
    finally:
        torch.set_warn_always(warns_always)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    assert np.array_equal(found, torch.from_numpy(matrix(0)).to(kind).float().numpy())


def test_chunks_do_not_change_the_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, experts = matrix(0, 21), np.stack([matrix(1), matrix(2)])
    file = {"blk.0.ffn_up.weight": values[::-1], "blk.0.ffn_up_exps.weight": experts}
    folder = {
        "model.layers.0.mlp.up_proj.weight": values,
        "model.layers.0.mlp.experts.1.up_proj.weight": experts[1],
    }
    monkeypatch.setattr(gguf_match, "CHUNK_ELEMENTS", 5 * COLUMNS + 1)
    matches = found(tmp_path, file, folder)
    assert list(matches) == list(folder)
    order = matches["model.layers.0.mlp.up_proj.weight"].order
    assert order is not None and np.array_equal(order, np.arange(21)[::-1])
    assert matches["model.layers.0.mlp.experts.1.up_proj.weight"].expert == 1
