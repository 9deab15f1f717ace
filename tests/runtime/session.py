"""llama.cpp through llama-cpp-python's C functions, with the options that the tests need.

Run as a script it writes a file's logits, so that another process (with another library) can be
compared with this one: `python session.py MODEL.gguf OUT.npy LENGTH OPTIONS`, with the session's
options as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np


def some_tokens(length: int) -> list[int]:
    """Tokens of a vocabulary of 90 or more."""
    return [(7 * i * i + 3 * i + 1) % 90 for i in range(length)]


TOKENS = some_tokens(24)

_log: list[str] = []


@llama_cpp.llama_log_callback
def _collect(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    _log.append(text.decode(errors="replace"))


llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class RefusedError(Exception):
    """llama.cpp would not load a file or make a context; the message is what it logged."""


def supports_low_rank() -> bool:
    """Whether the loaded library runs low-rank pairs."""
    function = getattr(llama_cpp.llama_cpp._lib, "llama_supports_low_rank", None)
    if function is None:
        return False
    function.restype = ctypes.c_bool
    return bool(function())


class Session:
    """A model and a context. With `count`, `operations` counts the graph's operations by name."""

    def __init__(
        self,
        path: Path,
        *,
        mmap: bool = True,
        gpu_layers: int = 0,
        flash_attention: bool = False,
        cache_type: int = llama_cpp.GGML_TYPE_F32,
        sequences: int = 1,
        loras: Sequence[Path] = (),
        count: bool = False,
        threads: int = 1,
        context: int = 256,
    ) -> None:
        _log.clear()
        llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))  # others in this process set theirs
        self.operations: dict[str, int] = {}
        self._model = self._context = None
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = gpu_layers
        if hasattr(model_params, "use_mmap"):
            model_params.use_mmap = mmap
        else:
            model_params.load_mode = (
                llama_cpp.LLAMA_LOAD_MODE_MMAP if mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
            )
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RefusedError("".join(_log))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache_type
        params.flash_attn_type = int(flash_attention)
        if count:
            params.cb_eval = self._callback = llama_cpp.ggml_backend_sched_eval_callback(
                self._count
            )
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RefusedError("".join(_log))
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._apply(loras)

    def _apply(self, loras: Sequence[Path]) -> None:
        if not loras:
            return
        handles = [
            llama_cpp.llama_adapter_lora_init(self._model, str(path).encode()) for path in loras
        ]
        if not all(handles):
            raise RefusedError("".join(_log))
        array = (llama_cpp.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*([1.0] * len(handles)))
        if hasattr(llama_cpp, "llama_set_adapters_lora"):
            failed = llama_cpp.llama_set_adapters_lora(self._context, array, len(handles), scales)
        else:
            failed = any(llama_cpp.llama_set_adapter_lora(self._context, h, 1.0) for h in handles)
        if failed:
            raise RefusedError("".join(_log))

    def _count(self, tensor: int, ask: bool, _data: int) -> bool:
        if ask:
            name = _operation_name(tensor)
            self.operations[name] = self.operations.get(name, 0) + 1
        return not ask

    def decode(self, tokens: Sequence[int], *, start: int = 0, sequence: int = 0) -> np.ndarray:
        """Append tokens to a sequence at position `start`; returns logits (tokens, vocabulary)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = True
            status = llama_cpp.llama_decode(self._context, batch)
            if status != 0:
                raise RefusedError(f"llama_decode: {status}: {''.join(_log[-3:])}")
            rows = [llama_cpp.llama_get_logits_ith(self._context, i) for i in range(len(tokens))]
            return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])
        finally:
            llama_cpp.llama_batch_free(batch)

    def state(self) -> bytes:
        size = llama_cpp.llama_state_get_size(self._context)
        buffer = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_get_data(self._context, buffer, size)
        return bytes(buffer)[:written]

    def set_state(self, state: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if llama_cpp.llama_state_set_data(self._context, buffer, len(state)) == 0:
            raise RefusedError("".join(_log[-3:]))

    def save(self, path: Path) -> None:
        """Write the loaded model as a file (llama_model_save_to_file)."""
        llama_cpp.llama_model_save_to_file(self._model, str(path).encode())

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None


def _operation_name(tensor: int) -> str:
    describe = llama_cpp.llama_cpp._lib.ggml_op_desc
    describe.restype = ctypes.c_char_p
    describe.argtypes = [ctypes.c_void_p]
    name: bytes = describe(tensor)
    return name.decode()


@contextlib.contextmanager
def opened(path: Path, **options: object) -> Iterator[Session]:
    session = Session(path, **options)  # type: ignore[arg-type]
    try:
        yield session
    finally:
        session.close()


def logits(path: Path, tokens: Sequence[int] = TOKENS, **options: object) -> np.ndarray:
    """Logits (tokens, vocabulary) of a prompt and of four single steps after it."""
    with opened(path, **options) as session:
        parts = [session.decode(tokens[:-4])]
        for i in range(len(tokens) - 4, len(tokens)):
            parts.append(session.decode(tokens[i : i + 1], start=i))
        return np.concatenate(parts)


if __name__ == "__main__":
    model, out, length, options = sys.argv[1:]
    np.save(out, logits(Path(model), some_tokens(int(length)), **json.loads(options)))
