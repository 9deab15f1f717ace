"""llama.cpp as a Runtime, over llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from svdexport.errors import InputError, ResourceError
from svdexport.runtimes.ggml import bindings, supports_low_rank
from svdexport.runtimes.gguf_file import GgufFile, adapter_of

BATCH = 2048  # tokens handed to llama_decode at once
MICRO_BATCH = 512  # tokens computed at once, llama.cpp's default
WARNING_LEVEL = 3  # ggml_log_level: 3 warning, 4 error (2 is info, 5 continues the line before)
NEEDS_PAIRS = (
    "holds low-rank pairs, which the installed llama.cpp does not know; install the llama.cpp "
    "runtime that svdexport builds (make setup), or export with form: stock"
)

_said: deque[str] = deque(maxlen=20)
_state: dict[str, Any] = {}


class LlamaCppRuntime:
    """A GGUF file loaded by llama.cpp on the CPU.

    Args:
        path: the GGUF.
        threads: for prompts and for single tokens alike.
        context: most tokens of a prompt with its continuation.
        exact: keep keys and values in F32, without flash attention: for comparisons of logits.
        adapters: LoRA adapter GGUFs to apply, at scale 1; without any, the one that the file says
            it has beside it (an export of form ``stock_lora``).

    Raises:
        InputError: the file is broken, or this llama.cpp cannot load it.
        MissingExtraError: llama-cpp-python is not installed.
    """

    name = "llama.cpp"

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        context: int,
        exact: bool = False,
        adapters: Sequence[Path] = (),
    ) -> None:
        self.path = path
        self.threads = threads
        self.context = context
        self._lib = bindings()
        quiet_log(self._lib)
        if holds_pairs(path) and not supports_low_rank():
            raise InputError(f"{path}: {NEEDS_PAIRS}")
        beside = adapter_of(path)
        self._exact, self._given = exact, adapters or ([beside] if beside else [])
        self._load()
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (T,) -> float32 logits (T, vocab) from an empty cache."""
        self._start(len(tokens))
        out = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._feed(part, every=True)
            out[start : start + len(part)] = self._rows(len(part))
        return out

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation: the new tokens only, ended by an end-of-generation token."""
        new: list[int] = []
        self._prompt(np.asarray(tokens), max_new_tokens)
        while len(new) < max_new_tokens:
            token = int(np.argmax(self._rows(1)))
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            new.append(token)
            if len(new) < max_new_tokens:
                self._feed(np.array([token]), every=False)
        return new

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds to process a prompt (T,) from an empty cache, logits of its last position."""
        self._start(len(tokens))
        begin = perf_counter()
        self._feed_prompt(tokens)
        self._lib.llama_synchronize(self._ctx)
        return perf_counter() - begin

    def decode(self, prompt: np.ndarray, count: int) -> float:
        """Seconds for ``count`` greedy one-token steps after the prompt, whose time is left out."""
        self._prompt(prompt, count)
        token = int(np.argmax(self._rows(1)))
        begin = perf_counter()
        for _ in range(count):
            self._feed(np.array([token]), every=False)
            token = int(np.argmax(self._rows(1)))
        return perf_counter() - begin

    def tokenize(self, text: str) -> list[int]:
        """Token ids of the text; special tokens in it are taken as such, none is added."""
        data = text.encode()
        room = len(data) + 8
        out = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, room, False, True)
        if count < 0:
            raise InputError(f"{self.path}: its tokenizer refuses the text")
        return list(out[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        room = 64 + 16 * len(tokens)
        for _ in range(2):  # once more with the room that llama.cpp asks for
            out = ctypes.create_string_buffer(room)
            n = self._lib.llama_detokenize(self._vocab, ids, len(tokens), out, room, False, True)
            if n >= 0:
                return out.raw[:n].decode("utf-8", errors="replace")
            room = -n
        raise InputError(f"{self.path}: its tokenizer cannot turn these tokens into text")

    def _load(self) -> None:
        _said.clear()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise InputError(f"{self.path}: llama.cpp cannot load it: {_last_said()}")
        self._ctx = self._open_context(self._exact)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._adapters = [self._open_adapter(adapter) for adapter in self._given]
        self._apply_adapters()

    def reload(self) -> None:
        self.close()
        self._load()

    def close(self) -> None:
        """Free the model; the object is not to be used after."""
        if self._ctx:
            self._lib.llama_free(self._ctx)
            self._lib.llama_model_free(self._model)  # frees its adapters too
            self._ctx = self._model = None

    def _open_context(self, exact: bool) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_outputs_max = min(BATCH, self.context)
        params.n_ubatch = min(MICRO_BATCH, self.context)
        params.n_threads = params.n_threads_batch = self.threads
        if exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        ctx = lib.llama_init_from_model(self._model, params)
        if not ctx:
            lib.llama_model_free(self._model)
            raise ResourceError(
                f"{self.path}: llama.cpp cannot open a context of {self.context}: {_last_said()}"
            )
        return ctx

    def _open_adapter(self, path: Path) -> Any:
        adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise InputError(f"{path}: llama.cpp cannot load this adapter: {_last_said()}")
        return adapter

    def _apply_adapters(self) -> None:
        if not self._adapters:
            return
        count = len(self._adapters)
        adapters = (self._lib.llama_adapter_lora_p_ctypes * count)(*self._adapters)
        scales = (ctypes.c_float * count)(*[1.0] * count)
        if self._lib.llama_set_adapters_lora(self._ctx, adapters, count, scales):
            raise InputError(f"{self.path}: llama.cpp cannot apply its adapters: {_last_said()}")

    def _start(self, tokens: int) -> None:
        if not 0 < tokens <= self.context:
            raise InputError(f"{self.path}: {tokens} tokens in a context of {self.context}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), False)

    def _prompt(self, tokens: np.ndarray, more: int) -> None:
        self._start(len(tokens))
        if len(tokens) + more > self.context:
            raise InputError(
                f"{self.path}: a prompt of {len(tokens)} and {more} tokens more do not fit a "
                f"context of {self.context}"
            )
        self._feed_prompt(tokens)

    def _feed_prompt(self, tokens: np.ndarray) -> None:
        for start in range(0, len(tokens), BATCH):
            self._feed(tokens[start : start + BATCH], every=False)

    def _feed(self, tokens: np.ndarray, every: bool) -> None:
        """Decode up to BATCH tokens after those in the cache; logits of all of them or the last."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        wanted = np.full(len(ids), every, dtype=np.int8)
        wanted[-1] = 1
        batch = self._lib.llama_batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        code = self._lib.llama_decode(self._ctx, batch)
        if code:
            raise InputError(f"{self.path}: llama_decode failed with {code}: {_last_said()}")

    def _rows(self, count: int) -> np.ndarray:
        """Logits of the last call's outputs (count, vocab), in llama.cpp's memory."""
        pointer = self._lib.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocab_size))


def holds_pairs(path: Path) -> bool:
    """Whether a GGUF has factor pairs, in place of dense weights or beside them."""
    return any(name.endswith(".lr_b.weight") for name in GgufFile(path).tensors)


def quiet_log(lib: Any) -> None:
    """Keep llama.cpp's log off the terminal; warnings and errors are kept for messages."""
    if "callback" in _state:  # set again: other code of this process may have set its own
        lib.llama_log_set(_state["callback"], None)
        return

    def keep(level: int, text: bytes, _user: object) -> None:
        if level >= WARNING_LEVEL and (line := text.decode("utf-8", "replace").strip()):
            _said.append(line)

    _state["callback"] = lib.llama_log_callback(keep)  # ctypes does not keep it alive
    lib.llama_log_set(_state["callback"], None)
    lib.llama_backend_init()


def _last_said() -> str:
    """The first of llama.cpp's last error lines: later ones only repeat that loading failed."""
    telling = [line for line in _said if "error loading model" in line or "missing tensor" in line]
    return (telling or list(_said) or ["no reason given"])[0 if telling else -1][:300]
