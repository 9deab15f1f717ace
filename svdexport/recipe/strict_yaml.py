"""YAML as recipes need it: plain data, bounded, and nothing that is guessed.

PyYAML's safe loader still lets through repeated keys, alias bombs, and YAML 1.1's readings of
``no``, ``010`` and ``1:30``; it reads ``1e-3`` as text. This loader has the scalars of YAML 1.2's
core schema, no aliases, no tags, no NaN or infinity, and limits on size, nodes and depth.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from svdexport.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 16
MAX_DIGITS = 40  # longer numbers are no setting, and int() takes quadratic time on them


class _RefusedError(Exception):
    """What is wrong at a place of the YAML text."""

    def __init__(self, mark: yaml.Mark, problem: str) -> None:
        super().__init__(f"line {mark.line + 1}: {problem}")


class _Loader(yaml.SafeLoader):
    """The safe loader without implicit YAML 1.1 scalars, aliases, merge keys or tags."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, stream: bytes | str) -> None:
        super().__init__(stream)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError(event.start_mark, "anchors and aliases (& and *) are not allowed")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _RefusedError(event.start_mark, f"the tag {tag[:60]!r} is not allowed")
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            raise _RefusedError(
                event.start_mark, "too many or too deeply nested values for a recipe"
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _RefusedError(
                key_node.start_mark, f"the key {str(key)[:60]!r} is not a plain name"
            )
        if key in result:
            raise _RefusedError(key_node.start_mark, f"repeated key {key[:60]!r}; keep one")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _construct_sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


def _construct_int(_: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        raise _RefusedError(node.start_mark, "a number of too many digits")
    return int(node.value)


def _construct_float(_: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower().replace(".nan", "nan").replace(".inf", "inf")
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(node.start_mark, f"{node.value[:60]!r} is not a finite number")
    return value


def _construct_str(_: _Loader, node: yaml.ScalarNode) -> str:
    return str(node.value)


_TAG = "tag:yaml.org,2002:"
_Loader.add_constructor(f"{_TAG}map", _construct_mapping)
_Loader.add_constructor(f"{_TAG}seq", _construct_sequence)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
_Loader.add_constructor(f"{_TAG}float", _construct_float)
_Loader.add_constructor(f"{_TAG}str", _construct_str)
# The core schema of YAML 1.2.2, section 10.3.2, less octal and hexadecimal numbers.
_Loader.add_implicit_resolver(
    f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: bytes | str, where: str) -> Any:
    """Plain Python data of one YAML document.

    Args:
        text: the document.
        where: what to call it in an error.

    Raises:
        RecipeError: for anything that is not bounded plain data, naming the line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _RefusedError as error:
        raise RecipeError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise RecipeError(f"{where}: {line}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"{where}: not a UTF-8 YAML text: {reason}") from None
    except (ValueError, OverflowError, RecursionError):
        # PyYAML's scanner raises these on a few malformed texts, such as out-of-range escapes.
        raise RecipeError(f"{where}: not valid YAML") from None


def read(path: Path) -> Any:
    """Plain data of a YAML file of at most ``MAX_BYTES``. Raises RecipeError."""
    try:
        if not path.exists():
            raise RecipeError(f"{path}: no such recipe; `svdexport init MODEL` writes one")
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no ordinary file"
            raise RecipeError(
                f"{path}: {what}; a recipe is a YAML file, as `svdexport init` writes"
            )
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES // 10**6} MB: not a recipe")
    return parse(text, path.name)
