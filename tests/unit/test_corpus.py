"""Calibration and evaluation text: what the model writes, files, data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svdexport.errors import RecipeError
from svdexport.models import corpus
from svdexport.models.corpus import consecutive, texts, write_text
from svdexport.recipe import Calibration, Evaluate
from tests.unit.test_models import llama


class Words:
    """A tokenizer of one token a character, for texts of known length."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 90 for c in text]}


def silent(*_: Any) -> None:
    return None


def test_the_model_writes_documents_and_text_after_random_tokens() -> None:
    model = llama(bos_token_id=1, eos_token_id=2)
    one = write_text(model, 70, 9, 5, silent)
    assert one.shape == (70, 9)
    begin = torch.arange(70) % 64 % 2 == 0
    assert torch.equal(one[:, 0] == 1, begin)  # every other one begins as documents do
    assert not torch.isin(one[~begin], torch.tensor([0, 1, 2])).any()
    assert torch.equal(one, write_text(model, 70, 9, 5, silent))
    assert not torch.equal(one, write_text(model, 70, 9, 6, silent))


def test_no_more_is_written_together_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(bos_token_id=1, eos_token_id=2)
    caches, notes = [], []

    def run(_model: Any, _args: Any, given: dict[str, Any], out: Any) -> None:
        layers = out.past_key_values.layers
        caches.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    model.register_forward_hook(run, with_kwargs=True)
    whole = write_text(model, 12, 9, 5, silent, notes.append)
    assert notes == []
    free = max(caches) // 2
    caches.clear()
    monkeypatch.setattr(corpus, "free_memory", lambda: free)
    part = write_text(model, 12, 9, 5, silent, notes.append)
    assert part.shape == whole.shape and not torch.equal(part, whole)
    assert free / 2 < max(caches) < free
    (line,) = notes
    assert "4 sequences at a time" in line


def test_each_written_token_is_among_the_likely_ones() -> None:
    model = llama(bos_token_id=None)
    model.lm_head.weight.data *= 200  # peaked: the nucleus is a token or two
    written = write_text(model, 4, 12, 0, silent)
    logits = model(written).logits[:, :-1]
    logits[..., [0, 2]] = -torch.inf  # padding and the end are never drawn
    probabilities = torch.softmax(logits, dim=-1)
    chosen = probabilities.gather(-1, written[:, 1:, None])[..., 0]
    above = (probabilities * (probabilities > chosen[..., None])).sum(-1)
    assert float(above.max()) <= 0.95


def test_held_out_text_is_not_the_calibration_text() -> None:
    calibration = Calibration(samples=5, length=12)
    samples, windows = texts(calibration, Evaluate(context=10, windows=3), llama(), Words(), silent)
    assert samples.shape == (5, 12)
    assert windows.shape == (3, 10)
    for window in windows:
        assert not (samples[:, :10] == window).all(dim=1).any()


def test_a_text_file_is_spread_over(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(1000)))
    calibration = Calibration(source="file", file=path, samples=4, length=100)
    samples, windows = texts(
        calibration, Evaluate(text=path, context=50, windows=3), llama(), Words(), silent
    )
    tokens = torch.tensor(Words()(path.read_text())["input_ids"])
    assert torch.equal(samples, tokens.view(10, 100)[[0, 2, 5, 7]])
    assert torch.equal(windows, tokens[:150].view(3, 50))


@pytest.mark.parametrize("kind", ["saved", "text", "jsonl"])
def test_a_local_data_set(tmp_path: Path, kind: str) -> None:
    import datasets

    lines = ["a line of words " * 4, "and another line " * 4]
    place = tmp_path / "data"
    data = datasets.Dataset.from_dict({"text": lines})
    if kind == "saved":
        data.save_to_disk(str(place))
    else:
        place.mkdir()
        if kind == "text":
            (place / "train.txt").write_text("\n".join(lines))
        else:
            data.to_json(place / "train.jsonl")
    calibration = Calibration(source="dataset", dataset=place, samples=2, length=30)
    evaluate = Evaluate(context=16, windows=1)
    samples, _ = texts(calibration, evaluate, llama(), Words(), silent)
    text = "\n".join(lines)
    assert samples[0].tolist() == Words()(text[:30])["input_ids"]
    wrong = Calibration(source="dataset", dataset=place, column="body", samples=2, length=30)
    with pytest.raises(RecipeError, match="no column 'body'; it has text"):
        texts(wrong, evaluate, llama(), Words(), silent)


def test_too_little_text_is_refused_with_both_lengths(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    calibration = Calibration(source="file", file=path, samples=1, length=8)
    with pytest.raises(RecipeError, match=r"short\.txt: 5 tokens .* 8"):
        texts(calibration, Evaluate(), llama(), Words(), silent)
    with pytest.raises(RecipeError, match="less than one window of 8"):
        consecutive([1, 2, 3], 8, 1, "here")
