"""What the artifact says: greedy continuations of a few prompts, with loops flagged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from svdexport.core.measures import Generation
from svdexport.runtimes.base import Runtime

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
)
NEW_TOKENS = 48

# A run counts as a loop from three repeats on, and from twelve tokens on: lists and rhymes repeat
# a word or two, but not for that long.
_MIN_REPEATS = 3
_MIN_TOKENS = 12


def generate(
    runtime: Runtime, prompts: Sequence[str] = PROMPTS, max_new_tokens: int = NEW_TOKENS
) -> tuple[Generation, ...]:
    """Continue each prompt greedily. A prompt that gives no token is skipped."""
    found = []
    for prompt in prompts:
        tokens = runtime.tokenize(prompt)
        if not tokens:
            continue
        new = runtime.generate(tokens, max_new_tokens)
        text = runtime.detokenize(new)
        found.append(Generation(prompt, text, len(new), looks_looping(new)))
    return tuple(found)


def looks_looping(tokens: Sequence[int]) -> bool:
    """Whether some stretch repeats with a fixed period, three times or more over twelve tokens."""
    data = np.asarray(tokens)
    for period in range(1, data.size // _MIN_REPEATS + 1):
        equal = data[period:] == data[:-period]
        if _longest_run(equal) + period >= max(_MIN_REPEATS * period, _MIN_TOKENS):
            return True
    return False


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(~np.concatenate(([False], flags, [False])))
    return int(np.diff(edges).max()) - 1
