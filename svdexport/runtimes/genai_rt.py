"""An ONNX folder in onnxruntime-genai."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError, MissingExtraError
from svdexport.runtimes.ort_rt import end_tokens, load_tokenizer
from svdexport.safety.headers import check_onnx


class GenaiRuntime:
    """``svdexport.runtimes.base.Runtime`` over onnxruntime-genai's generator (CPU).

    The key-value cache is allocated when a generator is made, outside the timed part.
    """

    name = "onnxruntime-genai"

    def __init__(self, path: Path, *, threads: int, context: int = 2048) -> None:
        """Load the folder. Raises InputError where genai cannot."""
        try:
            import onnxruntime_genai as genai
        except ImportError:
            raise MissingExtraError("onnx", "onnxruntime-genai") from None
        self.path = path
        self.threads = threads
        self.context = context
        self._genai = genai
        check_onnx(path)
        settings = _read_settings(path)
        check_onnx(path)
        self.vocab_size = int(settings["model"]["vocab_size"])
        self._load()
        self._end = end_tokens(path)
        self._tokenizer: Any = None

    def _load(self) -> None:
        options = {"intra_op_num_threads": self.threads}
        overlay = {
            "model": {"decoder": {"session_options": options}},
            "search": {"do_sample": False, "num_beams": 1},
        }
        try:
            config = self._genai.Config(str(self.path))
            config.overlay(json.dumps(overlay))
            self._model = self._genai.Model(config)
        except Exception as error:  # genai raises RuntimeError subclasses of its own
            raise InputError(f"{self.path}: onnxruntime-genai cannot load it ({error})") from None

    def _generator(self, length: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False, batch_size=1)
        try:
            return self._genai.Generator(self._model, parameters)
        except Exception as error:
            raise InputError(
                f"{self.path}: onnxruntime-genai cannot hold {length} tokens ({error})"
            ) from None

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (T,) -> float32 logits (T, vocab); token by token where the graph gives the last.

        The graph that generates usually gives the last position alone; onnxruntime's plain session
        is then the quicker way to the same weights' logits.
        """
        tokens = np.asarray(tokens, np.int32)
        generator = self._generator(tokens.size + 1)
        generator.append_tokens(tokens[None])
        logits: np.ndarray = np.asarray(generator.get_output("logits"), np.float32)[0]
        if logits.shape[0] == tokens.size:
            return logits
        generator = self._generator(tokens.size + 1)
        rows = []
        for token in tokens:
            generator.append_tokens(token[None, None])
            rows.append(np.asarray(generator.get_output("logits"), np.float32)[0, -1])
        return np.stack(rows)

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation, without the prompt; an end token ends it and is not given."""
        generator = self._generator(len(tokens) + max_new_tokens + 1)
        generator.append_tokens(np.asarray(tokens, np.int32)[None])
        new: list[int] = []
        while len(new) < max_new_tokens and not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._end:
                break
            new.append(token)
        return new

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds for a prompt from an empty, allocated cache."""
        tokens = np.asarray(tokens, np.int32)
        generator = self._generator(tokens.size + 1)
        start = time.perf_counter()
        generator.append_tokens(tokens[None])
        return time.perf_counter() - start

    def decode(self, prompt: np.ndarray, count: int) -> float:
        """Seconds for ``count`` greedy steps after the prompt; end tokens do not end it."""
        generator = self._generator(prompt.size + count + 2)
        generator.append_tokens(np.asarray(prompt, np.int32)[None])
        token = np.asarray(generator.get_logits()).reshape(-1, self.vocab_size)[-1].argmax()
        start = time.perf_counter()
        for _ in range(count):
            generator.append_tokens(np.asarray([[token]], np.int32))
            token = np.asarray(generator.get_logits()).reshape(-1, self.vocab_size)[-1].argmax()
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._text()(text, add_special_tokens=False)["input_ids"]
        return ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        text: str = self._text().decode(list(tokens))
        return text

    def _text(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    def reload(self) -> None:
        self.close()
        self._load()

    def close(self) -> None:
        del self._model


def _read_settings(path: Path) -> Any:
    file = path / "genai_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["model"]["decoder"]["filename"]
        settings["model"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not an onnxruntime-genai config ({error!r})") from None
    return settings
