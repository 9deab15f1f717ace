"""A real, small language model behind the Runtime protocol: the next token from the last one.

logits = unembed(tanh(...tanh(embed[token] W_1)... W_n)); with `rank`, each W is a pair B A.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class SmallRuntime:
    def __init__(
        self,
        path: Path,
        *,
        vocab: int = 50,
        width: int = 32,
        layers: int = 2,
        rank: int | None = None,
        seed: int = 0,
        threads: int = 1,
        noise: float = 0.0,
    ) -> None:
        path.write_bytes(b"small")
        self.name = "torch"
        self.path = path
        self.vocab_size = vocab
        self.threads = threads
        rng = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(vocab, width, generator=rng)
        self.weights = [
            torch.randn(width, width, generator=rng) / width**0.5 for _ in range(layers)
        ]
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if rank is not None:
            self.pairs = []
            for weight in self.weights:
                u, s, v = torch.linalg.svd(weight)
                self.pairs.append((u[:, :rank] * s[:rank], v[:rank]))
        self.unembed = torch.randn(vocab, width, generator=rng) / width**0.5 * 3
        self.unembed += noise * torch.randn(vocab, width, generator=rng)
        self.logit_calls = self.reloads = 0

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        x = self.embed[tokens]
        for i, weight in enumerate(self.weights):
            if self.pairs is None:
                x = torch.tanh(x @ weight.T)
            else:
                b, a = self.pairs[i]
                x = torch.tanh((x @ a.T) @ b.T)
        return x @ self.unembed.T

    def reload(self) -> None:
        self.reloads += 1

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.logit_calls += 1
        with torch.no_grad():
            return self._forward(torch.as_tensor(np.asarray(tokens, dtype=np.int64))).numpy()

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        out = list(tokens)
        for _ in range(max_new_tokens):
            out.append(int(self.logits(np.array(out[-1:]))[-1].argmax()))
        return out[len(tokens) :]

    def prefill(self, tokens: np.ndarray) -> float:
        start = time.perf_counter()
        self.logits(tokens)
        return time.perf_counter() - start

    def decode(self, prompt: np.ndarray, count: int) -> float:
        token = prompt[-1:]
        start = time.perf_counter()
        for _ in range(count):
            token = self.logits(token).argmax(-1)
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % self.vocab_size for c in text]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(chr(97 + t % 26) for t in tokens)

    def close(self) -> None:
        self.weights = []
