"""Small text documents of a model folder, and names from hostile files in one-line errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from svdexport.errors import InputError

MAX_JSON = 64 * 2**20  # a tokenizer.json of a 256k vocabulary is about 35 MB
# Bounds what json.loads may build: about 200 bytes of memory for each value.
MAX_VALUES = 4_000_000


class _RefusedError(Exception):
    """What is wrong in a JSON text."""


def quoted(name: object) -> str:
    """A name for an error message: on one line, printable, at most 80 characters."""
    text = ascii(str(name)[:200])
    return text if len(text) <= 80 else text[:76] + "...'"


def read_json(path: Path, *, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: not a regular file, too large, not UTF-8 JSON, not an object, or a repeated key.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: missing, or not an ordinary file")
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > max_bytes:
        raise InputError(f"{path}: larger than {max_bytes // 2**20} MiB")
    return parse_json(text, str(path), constants=True)


def parse_json(text: bytes, where: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in ``text``; ``constants`` lets NaN and Infinity through, as configs have.

    Raises:
        InputError: naming ``where`` and what is wrong.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise InputError(f"{where}: more than {MAX_VALUES} values")
    try:
        data = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_repeats,
            parse_constant=_constant if constants else _refuse_constant,
            parse_float=_finite,
        )
    except _RefusedError as error:
        raise InputError(f"{where}: {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({str(error)[:120]})") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: must hold a JSON object")
    return data


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {quoted(key)} is repeated")
            seen.add(key)
    return result


def _constant(name: str) -> float:
    return float(name.replace("Infinity", "inf"))


def _refuse_constant(name: str) -> float:
    raise _RefusedError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {text[:40]} is too large")
    return value
