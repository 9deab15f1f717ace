"""Values that several sections have: sizes in bytes, paths beside the recipe, precisions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, WithJsonSchema

# bfloat16 for the products of a model that runs; ``auto`` takes it where the processor has it
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SIZE = re.compile(r"^([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?B|[KMG]iB)$", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """Bytes of ``60MB`` (1 MB = 10**6), ``60MiB`` (2**20) or ``60000000``; a number stays one."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    match = _SIZE.match(f"{text}B" if text.isdigit() else text)
    if match is None:
        raise ValueError(f"{value[:40]!r} is not a size; write bytes, or for example 60MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _resolve_path(value: Any, info: ValidationInfo) -> Any:
    """A path relative to the recipe's folder; ``~`` is the home folder."""
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("an empty or malformed path")
        base = (info.context or {}).get("base")
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"{value[:80]!r}: no such home folder") from None
        return path if base is None else base / path
    return value


RecipePath: TypeAlias = Annotated[
    Path,
    BeforeValidator(_resolve_path),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "description": "relative to the recipe's folder"}),
]
Bytes: TypeAlias = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
