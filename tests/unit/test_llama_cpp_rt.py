"""llama.cpp as a runtime, and inspect of the files that it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svdexport.errors import InputError
from svdexport.runtimes import llama_cpp_rt
from svdexport.runtimes.inspect_gguf import inspect
from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime
from tests.unit.gguf_models import VOCABULARY, compress, export, load, make_model, torch_logits

TOKENS = np.random.default_rng(0).integers(3, 259, 50)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Source folder, dense GGUF, GGUF with pairs."""
    root = tmp_path_factory.mktemp("files")
    source = make_model(root / "source", "Llama")
    checkpoint, _ = compress(source, root / "small", rank=32)
    dense = export(source, source, root / "dense.gguf", type="F16").path
    return source, dense, export(checkpoint, source, root / "pairs.gguf", type="Q8_0").path


def test_logits_do_not_depend_on_the_batch(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = LlamaCppRuntime(files[1], threads=1, context=64, exact=True)
    whole = runtime.logits(TOKENS)
    assert whole.shape == (50, VOCABULARY) and whole.dtype == np.float32
    monkeypatch.setattr(llama_cpp_rt, "BATCH", 7)
    in_parts = runtime.logits(TOKENS)
    assert np.abs(whole - in_parts).max() < 5e-4 * np.ptp(whole)  # F16 weights round activations
    runtime.close()


def test_generate_is_greedy(files: tuple[Path, Path, Path]) -> None:
    runtime = LlamaCppRuntime(files[1], threads=1, context=64)
    new = runtime.generate(list(TOKENS[:20]), 8)
    model = load(files[0])
    meant: list[int] = []
    while len(meant) < 8:
        token = int(torch_logits(model, np.array([*TOKENS[:20], *meant]))[-1].argmax())
        if token == model.config.eos_token_id:
            break
        meant.append(token)
    assert meant, "the prompt ends at once: nothing would be shown"
    assert new == meant
    assert new == runtime.generate(list(TOKENS[:20]), 8)
    runtime.close()


def test_timings_are_of_the_work_asked_for(files: tuple[Path, Path, Path]) -> None:
    runtime = LlamaCppRuntime(files[1], threads=1, context=64)
    assert 0 < runtime.prefill(TOKENS) < 10
    assert 0 < runtime.decode(TOKENS[:10], 20) < 10
    with pytest.raises(InputError, match="do not fit a context of 64"):
        runtime.decode(TOKENS, 20)
    with pytest.raises(InputError, match="65 tokens in a context of 64"):
        runtime.prefill(np.full(65, 5))
    runtime.close()


def test_tokens_and_text(files: tuple[Path, Path, Path]) -> None:
    runtime = LlamaCppRuntime(files[1], threads=1, context=64)
    text = "the model writes: \N{GREEK SMALL LETTER LAMDA} and 7"
    tokens = runtime.tokenize(text)
    assert tokens[0] != 1  # no begin-of-sequence
    assert runtime.detokenize(tokens).strip() == text
    assert runtime.tokenize("") == [] and runtime.detokenize([]) == ""
    runtime.close()


def test_a_file_that_llama_cpp_cannot_load_is_one_line(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    data = files[1].read_bytes()
    bad.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(InputError, match=r"bad\.gguf: llama.cpp cannot load it: .*attn_q") as error:
        LlamaCppRuntime(bad, threads=1, context=64)
    assert "\n" not in str(error.value)


def test_pairs_in_a_stock_library_are_refused_with_a_way_out(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdexport.runtimes.ggml.LOW_RANK_SYMBOL", "llama_absent_symbol")
    with pytest.raises(InputError, match="does not know; install"):
        LlamaCppRuntime(files[2], threads=1, context=64)


def test_inspect_tells_pairs_from_dense(files: tuple[Path, Path, Path]) -> None:
    _, dense, pairs = (Path(file) for file in files)
    plain, compressed = inspect(dense), inspect(pairs)
    assert plain["runtime"] == "llama.cpp" and "low-rank" in compressed["runtime"]
    assert plain["totals"]["pairs"] == 0 and compressed["totals"]["pairs"] == 8
    forms = {entry["name"]: entry for entry in compressed["linears"] if entry["layer"] == 1}
    assert forms["ffn_gate_up"]["form"] == forms["attn_output"]["form"] == "pair"
    assert forms["ffn_gate_up"]["rank"] == 32 and forms["ffn_gate_up"]["shape"] == [192, 64]
    assert forms["attn_qkv"]["form"] == "pair" and forms["attn_qkv"]["shape"] == [128, 64]
    assert forms["ffn_down"]["types"] == {"a": "Q8_0", "b": "Q8_0"}
    by_type = compressed["totals"]["types"]
    linears = sum(entry["bytes"] for entry in compressed["linears"] + compressed["other"])
    assert linears == sum(by_type[t]["bytes"] for t in by_type if t != "F32")
    assert compressed["totals"]["bytes"] == pairs.stat().st_size


def test_inspect_refuses_a_broken_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 40)
    with pytest.raises(InputError, match=r"bad\.gguf"):
        inspect(bad)
