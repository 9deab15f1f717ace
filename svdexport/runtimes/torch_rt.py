"""PyTorch through transformers: the reference that other runtimes are compared with."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svdexport.checkpoint import is_encoder
from svdexport.errors import InputError
from svdexport.files import is_out_of_memory


class TorchRuntime:
    """A Hugging Face folder, dense or compressed, in float32 on the CPU."""

    name = "torch"

    def __init__(
        self, path: Path, threads: int, model: Any = None, trust_remote_code: bool = False
    ) -> None:
        """Load ``path``; or take ``model``, already loaded, with the tokenizer of ``path``.

        ``trust_remote_code``: whether code in the folder may run.
        """
        self.path, self.threads, self.trust_remote_code = path, threads, trust_remote_code
        torch.set_num_threads(threads)
        self.model = _load(path, trust_remote_code) if model is None else model
        self.vocab_size = int(self.model.config.get_text_config().vocab_size)
        self._tokenizer: Any = None

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
        found = self.model(input_ids=ids, use_cache=False)
        # an encoder has no logits: parity compares its hidden states
        values = found.logits if hasattr(found, "logits") else found.last_hidden_state
        result: np.ndarray = values[0].float().numpy()
        return result

    @torch.no_grad()
    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        ends = self.model.config.get_text_config().eos_token_id
        stop = set(ends) if isinstance(ends, list) else {ends}
        made: list[int] = []
        cache, current = None, torch.tensor([list(tokens)])
        while len(made) < max_new_tokens:
            out = self.model(input_ids=current, past_key_values=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
            if token in stop:
                break
            made.append(token)
            cache, current = out.past_key_values, torch.tensor([[token]])
        return made

    @torch.no_grad()
    def prefill(self, tokens: np.ndarray) -> float:
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
        start = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(self, prompt: np.ndarray, count: int) -> float:
        ids = torch.as_tensor(np.asarray(prompt, dtype=np.int64))[None]
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._text()(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._text().decode(list(tokens)))

    def reload(self) -> None:
        """Nothing: the weights may be those of a model that others hold, and loading is slow."""

    def close(self) -> None:
        self.model = None

    def _text(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                str(self.path), trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        return self._tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice from transformers: stdout and stderr are ours."""
    from transformers.utils import logging as hf_logging

    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def auto_class(folder: Path) -> Any:
    """transformers' class that loads a folder: AutoModel for an encoder."""
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return AutoModelForCausalLM  # which says what is wrong with the folder
    return AutoModel if is_encoder(config) else AutoModelForCausalLM


def _load(path: Path, trust_remote_code: bool) -> Any:
    try:
        with quiet_transformers():
            model = auto_class(path).from_pretrained(
                str(path),
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: transformers cannot load this folder ({reason})") from None
    return model.eval().requires_grad_(False)
