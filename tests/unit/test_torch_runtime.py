"""PyTorch as a runtime: logits, greedy texts and steps are those of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svdexport.errors import InputError
from svdexport.models.loader import load_model
from svdexport.runtimes.torch_rt import TorchRuntime
from tests.unit.tiny_checkpoints import VOCAB, compress, make_model

GROUPS = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]
TOKENS = np.random.default_rng(5).integers(3, 259, 12)
NEW = 10


@pytest.fixture(params=["dense", "pairs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_model(tmp_path / "dense", "llama")
    compress(tmp_path / "dense", tmp_path / "pairs", GROUPS, rank=24)
    for file in (tmp_path / "dense").glob("tokenizer*"):
        (tmp_path / "pairs" / file.name).write_bytes(file.read_bytes())
    return tmp_path / str(request.param)


def greedy(model: Any, ends: list[int]) -> list[int]:
    """transformers' own continuation of TOKENS, without the token that ends it."""
    found = model.generate(
        torch.from_numpy(TOKENS)[None],
        attention_mask=torch.ones((1, len(TOKENS)), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=ends,
        pad_token_id=0,
    )[0, len(TOKENS) :].tolist()
    return found[:-1] if found[-1] in ends else found


def test_logits_and_texts_are_the_models(folder: Path) -> None:
    model: Any = load_model(folder)
    runtime = TorchRuntime(folder, 1)
    assert runtime.vocab_size == VOCAB
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    assert runtime.logits(TOKENS).dtype == np.float32
    np.testing.assert_allclose(runtime.logits(TOKENS), expected, atol=1e-5)
    whole = greedy(model, [2])
    assert len(whole) > 4, "the text ends at once: nothing would be shown"
    assert runtime.generate(TOKENS.tolist(), NEW) == whole
    assert runtime.generate(TOKENS.tolist(), 3) == whole[:3]
    # every token that the model may end with ends it, and is not given
    end = next(token for token in whole if token != whole[0])
    for ends in (end, [2, end]):
        runtime.model.config.eos_token_id = ends
        assert runtime.generate(TOKENS.tolist(), NEW) == greedy(model, [2, end])
    assert runtime.generate(TOKENS.tolist(), NEW) == whole[: whole.index(end)]
    text = "some words and 7"
    assert runtime.detokenize(runtime.tokenize(text)) == text
    runtime.close()


def test_timings_are_of_the_work_asked_for(folder: Path) -> None:
    runtime = TorchRuntime(folder, 1)
    calls: list[tuple[int, int]] = []

    def note(_module: Any, _args: Any, given: dict[str, Any], out: Any) -> None:
        calls.append((given["input_ids"].shape[1], out.past_key_values.get_seq_length()))

    runtime.model.register_forward_hook(note, with_kwargs=True)
    assert runtime.prefill(TOKENS) > 0
    assert calls == [(12, 12)]
    calls.clear()
    assert runtime.decode(TOKENS[:8], 3) > 0
    # the prompt, then single tokens behind a cache that grows (one object for all of them)
    assert [length for length, _ in calls] == [8, 1, 1, 1]
    assert [there for _, there in calls] == [8, 9, 10, 11]
    runtime.close()


def test_a_folder_that_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="transformers cannot load this folder") as caught:
        TorchRuntime(tmp_path, 1)
    assert "\n" not in str(caught.value)
