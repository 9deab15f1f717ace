"""The unchanged library: a dense file gives the same bits, a file with pairs is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from tests.runtime import models
from tests.runtime.models import TinyModel, as_pairs, decoder
from tests.runtime.session import TOKENS, logits, some_tokens, supports_low_rank

ROOT = Path(__file__).parents[2]
SESSION = Path(__file__).with_name("session.py")

# the first build of the unchanged library takes minutes
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package llama_cpp with the unchanged library."""
    build = [sys.executable, str(ROOT / "tools" / "llama_cpp" / "build.py"), "--stock"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the unchanged library cannot be built here: {done.stderr[-500:]}")
    folder = tmp_path_factory.mktemp("stock")
    with zipfile.ZipFile(done.stdout.strip()) as wheel:
        wheel.extractall(folder)
    return folder


def environment(*paths: Path) -> dict[str, str]:
    """This process's, with these folders on Python's path and no other library named."""
    names = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    return names | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def run_stock(
    stock: Path, model: Path, out: Path, length: int = len(TOKENS), **options: int
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SESSION), str(model), str(out), str(length), json.dumps(options)],
        env=environment(stock),
        capture_output=True,
        text=True,
        check=False,
    )


DENSE = {
    "llama": decoder(),
    "qwen2": decoder("qwen2", biases=True),
    "mixture of experts": decoder(experts=models.EXPERTS),
    "plm": models.multi_latent(),
}


@pytest.mark.parametrize("model", DENSE.values(), ids=DENSE.keys())
def test_dense_file_is_bit_for_bit_the_same(tmp_path: Path, stock: Path, model: TinyModel) -> None:
    assert supports_low_rank()
    path = model.write(tmp_path / "dense.gguf")
    done = run_stock(stock, path, tmp_path / "stock.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(logits(path), np.load(tmp_path / "stock.npy"))


KINDS = ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K_S", "Q6_K", "Q2_K", "IQ4_NL"]


@pytest.mark.parametrize("kind", ["ALL_F32", *(f"MOSTLY_{kind}" for kind in KINDS)])
@pytest.mark.parametrize(("threads", "length"), [(1, 24), (3, 51), (2, 300), (16, 24)])
def test_quantised_dense_file_is_bit_for_bit_the_same(
    tmp_path: Path, stock: Path, kind: str, threads: int, length: int
) -> None:
    """Rows enough for several pieces of a product, in a number that no piece divides; prompts of
    20 and 47 tokens, whose tiles are of one width and of two, and of 296, in several blocks. More
    threads than cores: those that run take the rows of those that wait."""
    source = decoder(width=512, hidden=768, vocab=1048).write(tmp_path / "source.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    params.pure = True
    path = tmp_path / "dense.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
    done = run_stock(stock, path, tmp_path / "stock.npy", length, threads=threads, context=512)
    assert done.returncode == 0, done.stderr
    found = logits(path, some_tokens(length), threads=threads, context=512)
    np.testing.assert_array_equal(found, np.load(tmp_path / "stock.npy"))


@pytest.mark.parametrize("cache", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize(
    ("threads", "length", "head"),
    [(1, 24, 64), (1, 68, 64), (3, 209, 64), (1, 304, 64), (3, 304, 64), (3, 209, 66)],
)
def test_flash_attention_is_bit_for_bit_the_same(
    tmp_path: Path, stock: Path, cache: str, threads: int, length: int, head: int
) -> None:
    """Prompts of 64 and 205 tokens: one whole tile of positions, and three with a part of a fourth;
    tiles before, on and behind the mask's diagonal. One of 20 tokens has no tiles, but more rows
    than are taken together; from 256 positions on, each thread has its own part of them in a step.
    Heads of a size that no vector divides, too.
    """
    if cache == "Q8_0" and head % 32:
        pytest.skip("Q8_0 has blocks of 32")
    path = decoder(width=models.HEADS * head).write(tmp_path / "dense.gguf")
    options: dict[str, int] = {"flash_attention": True, "threads": threads, "context": 1024}
    options["cache_type"] = getattr(llama_cpp, f"GGML_TYPE_{cache}")
    done = run_stock(stock, path, tmp_path / "stock.npy", length, **options)
    assert done.returncode == 0, done.stderr
    found = logits(path, some_tokens(length), **options)
    np.testing.assert_array_equal(found, np.load(tmp_path / "stock.npy"))


def test_stock_refuses_pairs(tmp_path: Path, stock: Path) -> None:
    done = run_stock(stock, as_pairs(decoder()).write(tmp_path / "pairs.gguf"), tmp_path / "x.npy")
    assert done.returncode != 0
    assert "tensor 'blk.0.attn_q.weight' not found" in done.stderr


def test_doctor_says_that_a_stock_library_lacks_pairs(stock: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "svdexport", "doctor", "--json"],
        env=environment(stock, ROOT),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)["llama_cpp"]
    assert (found["installed"], found["low_rank"]) == (True, False)
    assert "stock one and refuses files with pairs" in found["advice"]
    assert "tools/llama_cpp/build.py" in found["advice"]
