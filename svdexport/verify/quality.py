"""Quality of an artifact on a text: perplexity, and divergence from a reference's next-token
distribution.

Windows are consecutive, do not overlap and get no begin-of-sequence token. In a window of T
tokens the logits of positions 0..T-2 are scored against tokens 1..T-1, as torch's shifted cross
entropy does. KL(reference || artifact) and the share of equal top tokens are the figures of
llama.cpp's `perplexity --kl-divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdexport.core.measures import Quality, Spread
from svdexport.errors import ArtifactError, InputError
from svdexport.runtimes.base import Runtime
from svdexport.verify.bootstrap import spread
from svdexport.verify.reference import LogitSource

Array = NDArray[np.float64]
Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]
Progress = Callable[[int, int], None]

# Float64 rows in work at once: 8 M numbers are 64 MB, whatever the size of the vocabulary.
_CHUNK_NUMBERS = 8_000_000
# A padded embedding may add rows that no token uses; more than this is another tokenizer.
_MAX_VOCAB_DIFFERENCE = 0.01
_QUANTILE = 0.999
_QUANTILE_DRAWS = 400  # each sorts all positions


@dataclass(frozen=True)
class _Window:
    """Per position (T-1,): negative log likelihood in nats, and against the reference."""

    nll: Array
    reference_nll: Array | None
    kld: Array | None
    same: NDArray[np.bool_] | None


def windows(tokens: Sequence[int] | Tokens, context: int, count: int) -> Tokens:
    """The first `count` consecutive windows of `context` tokens: int64 (n, context), n <= count.

    Raises InputError where the text does not fill one window.
    """
    data = np.asarray(tokens, dtype=np.int64)
    if context < 2 or count < 1:
        raise InputError(f"context {context} and windows {count}: need at least 2 and 1")
    found = min(count, data.size // context)
    if found == 0:
        raise InputError(
            f"the text has {data.size} tokens, fewer than one window of {context}: "
            "give a longer text or a smaller context"
        )
    return data[: found * context].reshape(found, context)


def evaluate(
    runtime: Runtime,
    tokens: Tokens,
    reference: LogitSource | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """Measure `runtime` on windows of tokens (W, T), against `reference` where there is one.

    Errors of the figures are by bootstrap over windows, paired where a reference takes part; with
    one window `spreads` stays empty. Raises ArtifactError where a logit is NaN, or a divergence
    is infinite; InputError where the vocabularies differ.
    """
    if reference is not None and reference.count < len(tokens):
        raise InputError(f"the reference has {reference.count} windows of {len(tokens)}")
    scored = []
    for index, window in enumerate(tokens):
        logits = runtime.logits(window)
        other = None if reference is None else reference.window(index)
        scored.append(_score(logits, other, window, f"{runtime.path} (window {index})"))
        if progress is not None:
            progress(index + 1, len(tokens))
    return _summary(scored, tokens.shape[1], seed)


def log_softmax(rows: NDArray[np.floating]) -> Array:
    """Natural logarithm of the softmax of each row, in float64."""
    data = rows.astype(np.float64)
    data -= data.max(axis=-1, keepdims=True)
    data -= np.log(np.exp(data).sum(axis=-1, keepdims=True))
    return data


def _score(logits: Logits, other: Logits | None, window: Tokens, where: str) -> _Window:
    if logits.ndim != 2 or logits.shape[0] != window.size:
        raise ArtifactError(f"{where}: logits of shape {logits.shape} for {window.size} tokens")
    vocab = logits.shape[1] if other is None else _common_vocab(logits, other, where)
    if int(window.max()) >= vocab:
        raise InputError(f"{where}: token {int(window.max())} is outside of {vocab} logits")
    targets = window[1:]
    nll, kld = np.empty(targets.size), np.empty(targets.size)
    reference_nll, same = np.empty(targets.size), np.empty(targets.size, dtype=bool)
    for part in _chunks(targets.size, vocab):
        at = (np.arange(part.stop - part.start), targets[part])
        log_q = log_softmax(logits[part, :vocab])
        nll[part] = -log_q[at]
        if other is None:
            continue
        log_p = log_softmax(other[part, :vocab])
        reference_nll[part] = -log_p[at]
        p = np.exp(log_p)
        # 0 log 0 = 0: a token that the reference rules out adds nothing
        gap = np.where(p > 0, log_p, 0.0) - np.where(p > 0, log_q, 0.0)
        kld[part] = (p * gap).sum(axis=-1)
        same[part] = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    _finite(nll, f"{where}: the logits are not finite")
    if other is None:
        return _Window(nll, None, None, None)
    _finite(reference_nll, f"{where}: the reference's logits are not finite")
    _finite(kld, f"{where}: the divergence from the reference is not finite")
    # rounding alone can give -1e-17 for equal distributions
    return _Window(nll, reference_nll, np.maximum(kld, 0.0), same)


def _common_vocab(logits: Logits, other: Logits, where: str) -> int:
    mine, its = logits.shape[1], other.shape[1]
    if abs(mine - its) > _MAX_VOCAB_DIFFERENCE * max(mine, its):
        raise InputError(f"{where}: {mine} tokens in the vocabulary, {its} in the reference's")
    return int(min(mine, its))


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, _CHUNK_NUMBERS // max(1, vocab))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _finite(values: Array, message: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ArtifactError(f"{message} at position {int(bad[0])}")


def _summary(scored: list[_Window], context: int, seed: int) -> Quality:
    nll = np.array([w.nll.mean() for w in scored])
    figures: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "perplexity": lambda i: float(np.exp(nll[i].mean()))
    }
    klds = [w.kld for w in scored if w.kld is not None]
    window_kld: tuple[float, ...] = ()
    if klds:
        kld = np.stack(klds)
        mean_kld = kld.mean(axis=1)
        same = np.array([w.same.mean() for w in scored if w.same is not None])
        base = np.array([w.reference_nll.mean() for w in scored if w.reference_nll is not None])
        figures |= {
            "mean_kld": lambda i: float(mean_kld[i].mean()),
            "kld_p999": lambda i: float(np.quantile(kld[i], _QUANTILE)),
            "same_top": lambda i: float(same[i].mean()),
            "perplexity_ratio": lambda i: float(np.exp((nll[i] - base[i]).mean())),
        }
        window_kld = tuple(float(v) for v in mean_kld)
    every = np.arange(len(scored))
    values = {name: figure(every) for name, figure in figures.items()}
    return Quality(
        perplexity=values["perplexity"],
        tokens=sum(w.nll.size for w in scored),
        windows=len(scored),
        context=context,
        mean_kld=values.get("mean_kld"),
        kld_p999=values.get("kld_p999"),
        same_top=values.get("same_top"),
        perplexity_ratio=values.get("perplexity_ratio"),
        spreads=_spreads(figures, len(scored), seed),
        window_nll=tuple(float(v) for v in nll),
        window_kld=window_kld,
    )


def _spreads(
    figures: dict[str, Callable[[NDArray[np.int64]], float]], count: int, seed: int
) -> dict[str, Spread]:
    if count < 2:
        return {}
    found = {}
    for name, figure in figures.items():
        if name == "kld_p999":
            found[name] = spread(count, figure, seed, _QUANTILE_DRAWS)
        else:
            found[name] = spread(count, figure, seed)
    return found
