"""A decoder's model.onnx in a plain onnxruntime session, with its key-value cache."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError, MissingExtraError
from svdexport.files import is_out_of_memory
from svdexport.safety.headers import check_onnx

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CHUNK = 512
"""Tokens per call in ``logits``: bounds the (tokens, vocabulary) buffer inside the session."""


def model_file(path: Path) -> Path:
    """The graph of an ONNX artifact. Raises InputError where there is none, or more than one."""
    if path.is_file():
        return path
    for name in ("model.onnx", "onnx/model.onnx"):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} *.onnx files and no model.onnx")
    return found[0]


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, by transformers, from disk alone."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer that transformers can read ({error})") from None


def end_tokens(folder: Path) -> frozenset[int]:
    """Token ids that end a text: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


@contextmanager
def told_length(file: Path, folder: Path, tokens: int) -> Iterator[None]:
    """Within this context what onnxruntime cannot run is an InputError that tells the lengths."""
    try:
        yield
    except Exception as error:  # onnxruntime has one exception class per cause, none of ours
        if is_out_of_memory(error):
            raise
        context = _config_context(folder)
        if context is not None and tokens > context:
            why = f"{tokens} tokens do not fit the model's context of {context}; give fewer"
        else:
            why = f"onnxruntime cannot run it on {tokens} tokens ({str(error).splitlines()[0]})"
        raise InputError(f"{file}: {why}") from None


class OrtRuntime:
    """``svdexport.runtimes.base.Runtime`` over onnxruntime's CPU provider.

    Inputs and outputs are those of transformers' ONNX layout: ``input_ids``, ``attention_mask``,
    ``position_ids`` where the graph has it, ``past_key_values.N.key/value`` -> ``logits``,
    ``present.N.key/value``. Where the graph attends with GroupQueryAttention, past and present are
    one preallocated buffer, which the operator updates in place. A folder with a second graph for
    the last position's logits generates with that one; one session is open at a time.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, threads: int, context: int = 2048) -> None:
        """Load the graph. Raises InputError where it is not a decoder with a cache."""
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingExtraError("onnx", "running an ONNX model") from None
        self.path = path
        self.threads = threads
        self.context = context
        self._ort = ort
        self._every = model_file(path)
        last = self._every.with_name("model_last.onnx")
        self._last = last if last.is_file() else self._every
        check_onnx(self._every)
        check_onnx(self._last)
        self._shared = _has_group_query_attention(self._every)
        folder = self._every.parent
        self._folder = folder if (folder / "config.json").exists() else path
        self._head_dim = _head_dim(self._folder)
        self._end = end_tokens(self._folder)
        self._tokenizer: Any = None
        self._session: Any = None
        self._cache: dict[str, Any] = {}
        self.file: Path | None = None
        self._open(self._last)
        session: Any = self._session
        width = session.get_outputs()[0].shape[-1]
        self.vocab_size = int(width) if isinstance(width, int) else _config_vocab(self._folder)
        self._reset(0)

    def _open(self, file: Path) -> None:
        """Make ``file`` the loaded graph."""
        if self._session is not None and self.file == file:
            return
        options = self._options()
        self._session, self._cache = None, {}  # the old one goes before the new one comes
        self.file = file
        try:
            self._session = self._load(file, options)
        except Exception as error:  # onnxruntime has one exception class per cause, none of ours
            raise InputError(f"{file}: onnxruntime cannot load it ({error})") from None
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._past = sorted(name for name in self._inputs if name.startswith("past_key_values."))
        if "input_ids" not in self._inputs or not self._past:
            raise InputError(f"{file}: not a decoder with input_ids and past_key_values.*")

    def _load(self, file: Path, options: Any) -> Any:
        return self._ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its errors are raised as well
        return options

    # Cache

    def _reset(self, length: int) -> None:
        """An empty cache with room for ``length`` tokens."""
        self._length = 0
        self._cache = {}
        for name in self._past:
            shape = [size if isinstance(size, int) else None for size in self._inputs[name].shape]
            heads, width = shape[1], shape[3] or self._head_dim
            if heads is None or width is None:
                raise InputError(f"{self.file}: {name} has no fixed number of heads or head size")
            tokens = length if self._shared else 0
            array = np.zeros((1, heads, tokens, width), _NUMPY[self._inputs[name].type])
            self._cache[name] = self._ort.OrtValue.ortvalue_from_numpy(array)

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens (T,) to the cache; logits (T or 1, vocab) as the graph gives them."""
        total = self._length + tokens.size
        binding = self._session.io_binding()
        feeds = {
            "input_ids": tokens.astype(np.int64)[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
        }
        for name, array in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values.", "present.")
            if self._shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
        binding.bind_output("logits", "cpu")
        with told_length(self.file or self.path, self._folder, total):
            self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._bound_outputs(), binding.get_outputs(), strict=True))
        if not self._shared:
            for name in self._past:
                self._cache[name] = outputs[name.replace("past_key_values.", "present.")]
        self._length = total
        logits: np.ndarray = outputs["logits"].numpy()[0]
        return logits

    def _bound_outputs(self) -> list[str]:
        return [*(name.replace("past_key_values.", "present.") for name in self._past), "logits"]

    # Runtime

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (T,) -> float32 logits (T, vocab), in chunks over a growing cache."""
        tokens = np.asarray(tokens)
        self._open(self._every)
        self._reset(tokens.size)
        parts = []
        for start in range(0, tokens.size, _CHUNK):
            part = self._step(tokens[start : start + _CHUNK])
            if part.shape[0] != min(_CHUNK, tokens.size - start):
                return self._logits_one_by_one(tokens)
            parts.append(part.astype(np.float32))
        return np.concatenate(parts)

    def _logits_one_by_one(self, tokens: np.ndarray) -> np.ndarray:
        """For graphs that give the last position alone."""
        self._reset(tokens.size)
        rows = [self._step(tokens[index : index + 1])[-1] for index in range(tokens.size)]
        return np.stack(rows).astype(np.float32)

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation, without the prompt; an end token ends it and is not given."""
        self._open(self._last)
        self._reset(len(tokens) + max_new_tokens)
        new: list[int] = []
        step = np.asarray(tokens)
        while len(new) < max_new_tokens:
            token = int(self._step(step)[-1].argmax())
            if token in self._end:
                break
            new.append(token)
            step = np.asarray([token])
        return new

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds for a prompt; foreign graphs may compute every position's logits."""
        self._open(self._last)
        self._reset(tokens.size)
        start = time.perf_counter()
        self._step(np.asarray(tokens))
        return time.perf_counter() - start

    def decode(self, prompt: np.ndarray, count: int) -> float:
        """Seconds for ``count`` greedy steps after the prompt."""
        self._open(self._last)
        self._reset(prompt.size + count)
        token = self._step(np.asarray(prompt))[-1].argmax()
        start = time.perf_counter()
        for _ in range(count):
            token = self._step(np.asarray([token]))[-1].argmax()
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._text()(text, add_special_tokens=False)["input_ids"]
        return ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        text: str = self._text().decode(list(tokens))
        return text

    def _text(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    def reload(self) -> None:
        self.close()
        self._open(self._last)
        self._reset(0)

    def close(self) -> None:
        self._session, self._cache = None, {}


def _has_group_query_attention(file: Path) -> bool:
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    return any(node.op_type == "GroupQueryAttention" for node in graph.node)


def _head_dim(folder: Path) -> int | None:
    if not (folder / "config.json").exists():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("head_dim"):
        return int(config["head_dim"])
    if "hidden_size" in config and "num_attention_heads" in config:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return None


def _config_vocab(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _config_context(folder: Path) -> int | None:
    """Positions that the folder's model knows, where its config.json says."""
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None
