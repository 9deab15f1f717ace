"""One face over the runtimes that artifacts are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Runtime(Protocol):
    """A loaded artifact. Tokens are ids of the model's own tokenizer; times are wall seconds."""

    name: str
    path: Path
    vocab_size: int
    threads: int

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (T,) -> float32 logits (T, vocab) from an empty cache."""
        ...

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation: the new tokens only, ended by the model's end token or the count."""
        ...

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds to process a prompt (T,) from an empty cache, logits of its last position."""
        ...

    def decode(self, prompt: np.ndarray, count: int) -> float:
        """Seconds for ``count`` greedy single-token steps after the prompt (whose time is not)."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of the text, with no begin-of-sequence token added."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str: ...

    def reload(self) -> None:
        """Load the artifact again: where its memory happens to lie changes its speed."""
        ...

    def close(self) -> None: ...
