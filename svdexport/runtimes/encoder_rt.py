"""An encoder's model.onnx in a plain onnxruntime session: hidden states and sentence embeddings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svdexport.errors import InputError, MissingExtraError
from svdexport.runtimes.ort_rt import load_tokenizer, model_file, told_length
from svdexport.safety.headers import check_onnx


def is_encoder_graph(path: Path) -> bool:
    """Whether an ONNX artifact gives hidden states and no logits."""
    import onnx

    file = model_file(path)
    check_onnx(file)
    graph = onnx.load(str(file), load_external_data=False).graph
    names = {output.name for output in graph.output}
    return "last_hidden_state" in names and "logits" not in names


class EncoderRuntime:
    """``svdexport.runtimes.base.Runtime`` for a model that writes nothing.

    ``logits`` are the hidden states (T, width), which parity compares; ``prefill`` is the time of
    a text. There is nothing to generate.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, threads: int) -> None:
        """Load the graph. Raises InputError where onnxruntime cannot."""
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingExtraError("onnx", "running an ONNX model") from None
        self.path = path
        self.threads = threads
        self._ort, self._file = ort, model_file(path)
        check_onnx(self._file)
        self._load()
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.vocab_size = int(config["vocab_size"])
        self._tokenizer: Any = None

    def _load(self) -> None:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its errors are raised as well
        try:
            self._session: Any = self._ort.InferenceSession(
                str(self._file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one exception class per cause, none of ours
            raise InputError(f"{self._file}: onnxruntime cannot load it ({error})") from None

    def _run(self, output: str, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feeds = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": np.zeros(tokens.shape, np.int64),
        }
        used = {name: value for name, value in feeds.items() if name in self._inputs}
        with told_length(self._file, self.path, tokens.shape[1]):
            found: np.ndarray = self._session.run([output], used)[0]
        return found

    def embed(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Sentence embeddings (batch, width), of length 1.

        Args:
            tokens: ids (batch, T), padded anyhow. mask: 1 for the tokens that count.

        Raises InputError where the graph has no ``sentence_embedding``.
        """
        if "sentence_embedding" not in self._outputs:
            raise InputError(f"{self.path}: the graph has no sentence_embedding output")
        return self._run("sentence_embedding", tokens, mask)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (T,) -> hidden states (T, width), float32."""
        batch = np.asarray(tokens)[None]
        found: np.ndarray = self._run("last_hidden_state", batch, np.ones_like(batch))[0]
        return found.astype(np.float32)

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        raise InputError(f"{self.path}: an encoder generates no text")

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds for a text (T,)."""
        batch = np.asarray(tokens)[None]
        mask = np.ones_like(batch)
        output = self._outputs[-1]
        start = time.perf_counter()
        self._run(output, batch, mask)
        return time.perf_counter() - start

    def decode(self, prompt: np.ndarray, count: int) -> float:
        raise InputError(f"{self.path}: an encoder has no decode steps to time")

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._text()(text, add_special_tokens=False)["input_ids"]
        return ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._text().decode(list(tokens)))

    def _text(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    def reload(self) -> None:
        self._load()

    def close(self) -> None:
        self._session = None
