"""Calibration and evaluation tokens: text the model writes itself, a text file, or a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdexport.core.machine import free_memory
from svdexport.errors import MissingExtraError, RecipeError
from svdexport.recipe import Calibration, Evaluate

GENERATE_BATCH = 64  # sequences written together: decoding is bound by reading the weights
CACHE_SHARE = 0.75  # of the free memory, for their keys and values
TOP_P, TOP_K = 0.95, 256

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


def texts(
    calibration: Calibration,
    evaluate: Evaluate,
    model: Any,
    tokenizer: Any,
    progress: Progress,
    note: Note | None = None,
) -> tuple[Tensor, Tensor]:
    """Calibration samples (samples, length) and evaluation windows (windows, context), int64.

    Where the model writes both, it does so in one go: sequences beyond the samples are held out.
    Raises RecipeError where a text is empty, not UTF-8 or shorter than what is asked for.
    """
    written = _written(calibration, evaluate, model, progress, note)
    if calibration.source == "self":
        assert written is not None
        samples = written[: calibration.samples, : calibration.length].contiguous()
    else:
        where, text = _given_text(calibration)
        tokens = tokenize(tokenizer, text)
        samples = _spread(tokens, calibration.samples, calibration.length, where)
    if evaluate.text is not None:
        tokens = tokenize(tokenizer, read_text(evaluate.text))
        found = consecutive(tokens, evaluate.context, evaluate.windows, str(evaluate.text))
        return samples, found
    assert written is not None
    return samples, written[-evaluate.windows :, : evaluate.context].contiguous()


def model_writes(calibration: Calibration, evaluate: Evaluate) -> str:
    """Which of the texts the model writes itself, for people; empty where none."""
    own = {"calibration": calibration.source == "self", "evaluation": evaluate.text is None}
    return " and ".join(name for name, by_model in own.items() if by_model)


def more_text(
    calibration: Calibration,
    samples: int,
    length: int,
    model: Any,
    tokenizer: Any,
    progress: Progress,
    note: Note | None = None,
) -> Tensor:
    """Further samples (samples, length) of the calibration source, for training.

    Text that the model writes itself is new, so that none of it is the evaluation's.
    Raises RecipeError as ``texts`` does.
    """
    if calibration.source == "self":
        return write_text(model, samples, length, calibration.seed + 1, progress, note)
    where, text = _given_text(calibration)
    return _spread(tokenize(tokenizer, text), samples, length, where)


def encoder_texts(
    calibration: Calibration, evaluate: Evaluate, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    """As ``texts``, none of them the model's own; samples begin and end as an encoder's inputs."""
    assert calibration.source != "self"
    assert evaluate.text is not None
    where, text = _given_text(calibration)
    samples = _spread(tokenize(tokenizer, text), calibration.samples, calibration.length, where)
    tokens = tokenize(tokenizer, read_text(evaluate.text))
    windows = consecutive(tokens, evaluate.context, evaluate.windows, str(evaluate.text))
    for part in (samples, windows):
        for place, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
            if token is not None:
                part[:, place] = token
    return samples, windows


def _written(
    calibration: Calibration, evaluate: Evaluate, model: Any, progress: Progress, note: Note | None
) -> Tensor | None:
    count, length = 0, 0
    if calibration.source == "self":
        count, length = calibration.samples, calibration.length
    if evaluate.text is None:
        count, length = count + evaluate.windows, max(length, evaluate.context)
    return write_text(model, count, length, calibration.seed, progress, note) if count else None


def consecutive(tokens: list[int], context: int, windows: int, where: str) -> Tensor:
    """The first ``windows`` windows without overlap; RecipeError where not one is full."""
    count = min(windows, len(tokens) // context)
    if count == 0:
        raise RecipeError(
            f"{where}: {len(tokens)} tokens are less than one window of {context}; "
            f"give more text or a smaller context"
        )
    return torch.tensor(tokens[: count * context], dtype=torch.long).view(count, context)


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens; parts at line ends keep long texts fast."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def read_text(path: Path) -> str:
    """A UTF-8 text file; RecipeError where it is missing, empty or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise RecipeError(f"{path}: the text is empty")
    return text


def _given_text(calibration: Calibration) -> tuple[str, str]:
    if calibration.source == "file":
        assert calibration.file is not None
        return str(calibration.file), read_text(calibration.file)
    return str(calibration.dataset), _dataset_text(calibration)


def _dataset_text(calibration: Calibration) -> str:
    """The text column of a local folder or file that ``datasets`` can load."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "calibration.source: dataset") from None
    path = Path(str(calibration.dataset))
    where = f"{path}, split {calibration.split}"
    if not path.exists():
        raise RecipeError(f"calibration.dataset: {path}: no such file or folder")
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
            data = loaded[calibration.split] if isinstance(loaded, dict) else loaded
        else:
            data = datasets.load_dataset(str(path), split=calibration.split)
    except Exception as error:  # datasets raises many types for an unreadable folder
        raise RecipeError(f"{where}: datasets cannot load it ({error})") from None
    if calibration.column not in data.column_names:
        raise RecipeError(
            f"{where}: no column {calibration.column!r}; it has {', '.join(data.column_names)}"
        )
    text = "\n".join(str(row) for row in data[calibration.column])
    if not text.strip():
        raise RecipeError(f"{where}: the column {calibration.column!r} holds no text")
    return text


def _spread(tokens: list[int], samples: int, length: int, where: str) -> Tensor:
    """Samples spread evenly over the text, so that all of it counts; none overlap."""
    available = len(tokens) // length
    if available == 0:
        raise RecipeError(
            f"{where}: {len(tokens)} tokens are shorter than one sequence of {length}; "
            f"give more text or a smaller calibration.length"
        )
    count = min(samples, available)
    starts = [i * available // count * length for i in range(count)]
    return torch.tensor([tokens[s : s + length] for s in starts], dtype=torch.long)


@torch.no_grad()
def write_text(
    model: Any,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
    note: Note | None = None,
) -> Tensor:
    """Sequences that the model writes itself, (samples, length): a data-free calibration text.

    Every other one begins as documents do, with the beginning token, and may go on beyond an end
    (a chat model writes conversations so). The others, and all where the model has no such token,
    begin with a random token (as in LLM-QAT, Liu et al., 2023, arXiv 2305.17888) and never draw
    a special one. Tokens are drawn at temperature 1 from the most likely 95 % (of 256 at most).
    Deterministic for a seed, a thread count and a torch version, and for the number of sequences
    written together: 64, or as many as memory holds, which ``note`` is then told.
    """
    together = min(GENERATE_BATCH, samples)
    fitting = max(1, int(CACHE_SHARE * free_memory()) // _cache_bytes(model, length))
    if fitting < together:
        together = fitting
        if note is not None:
            note(
                f"text written {together} sequences at a time, as memory holds no more; "
                f"with room for {min(GENERATE_BATCH, samples)} it is another text"
            )
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    special = _special_tokens(model)
    allowed = torch.ones(config.vocab_size)
    allowed[special] = 0.0
    written = []
    for start in range(0, samples, together):
        count = min(together, samples - start)
        first = torch.multinomial(allowed, count, replacement=True, generator=generator)
        documents = torch.zeros(count, dtype=torch.bool)
        if isinstance(config.bos_token_id, int):
            documents[::2] = True
            first[documents] = config.bos_token_id
        banned = torch.zeros((count, config.vocab_size))
        banned[:, special] = torch.where(documents, 0.0, -torch.inf)[:, None]
        tokens, cache, current = [first], None, first[:, None]
        for step in range(1, length):
            out = model(input_ids=current, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            drawn = _sample(out.logits[:, -1].float() + banned, generator)
            tokens.append(drawn)
            current = drawn[:, None]
            if step % 32 == 0:
                progress("write text", start * length + step * count, samples * length)
        written.append(torch.stack(tokens, dim=1))
    progress("write text", samples * length, samples * length)
    return torch.cat(written)


def _cache_bytes(model: Any, length: int) -> int:
    """Of the keys and values of one sequence of that many tokens, from those of one token."""
    out = model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=True)
    total = 0
    for layer in getattr(out.past_key_values, "layers", ()):
        tokens = min(length, getattr(layer, "sliding_window", None) or length)
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += part.nbytes * tokens if isinstance(part, Tensor) else 0
    return max(1, total)


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from the smallest set of tokens with TOP_P of the probability."""
    top, tokens = torch.softmax(logits, dim=-1).topk(min(TOP_K, logits.shape[-1]), dim=-1)
    before = top.cumsum(-1) - top
    top[before > TOP_P] = 0.0
    choice = torch.multinomial(top, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]


def _special_tokens(model: Any) -> list[int]:
    config = model.config.get_text_config()
    found: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list):
            found.update(value)
    return sorted(token for token in found if 0 <= token < config.vocab_size)
