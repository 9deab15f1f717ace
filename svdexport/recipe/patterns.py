"""Patterns that choose modules: a full module path, or ``re:`` and a regular expression."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field


def as_tuple(value: Any) -> Any:
    """YAML's lists as tuples, which a frozen model needs."""
    return tuple(value) if isinstance(value, list) else value


def check_pattern(value: str) -> str:
    """Raises ValueError where it is neither a module path nor a regular expression."""
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{value[:80]!r} is not a regular expression ({error})") from None
    elif not re.fullmatch(r"[\w.-]+", value):
        raise ValueError(
            f"{value[:80]!r} is not a module name; for a regular expression write 're:...'"
        )
    return value


def _check_all(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(check_pattern(pattern) for pattern in value)


Pattern: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
Patterns: TypeAlias = Annotated[
    tuple[Pattern, ...], BeforeValidator(as_tuple), AfterValidator(_check_all)
]
