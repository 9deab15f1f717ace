"""From a recipe file and ``--set`` overrides to a Recipe, with errors that a person can act on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from svdexport.errors import RecipeError
from svdexport.recipe import strict_yaml
from svdexport.recipe.hints import did_you_mean
from svdexport.recipe.schema import Recipe

# Keys that hold paths: in the file relative to the recipe's folder, on the command line to the
# current one, as a shell completes them.
PATH_KEYS = ("model.path", "model.gguf", "calibration.file", "calibration.dataset", "evaluate.text")
MAX_PROBLEMS = 20
MAX_LIST = 64


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: ``a.b=value`` each, list entries by number (``export.0.type=Q4_0``); the
            value is a YAML scalar or a list of them. Paths given here are
            relative to the current folder.

    Raises:
        RecipeError: one line per problem: file, key, what is wrong, what to do.
    """
    path = Path(path)
    data = strict_yaml.read(path)
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path.name}: not a recipe: it must be a mapping that begins with 'schema: 1'"
        )
    for override in overrides:
        _apply_override(data, override, path.name)
    return validate(data, path.name, path.absolute().parent)


def validate(data: dict[str, Any], where: str, base: Path | None = None) -> Recipe:
    """A Recipe from plain data; paths are taken relative to ``base``. Raises RecipeError."""
    try:
        recipe = Recipe.model_validate(data, context={"base": base})
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(entry) for entry in error.errors(include_url=False)))
        more = len(problems) - MAX_PROBLEMS
        lines = [f"{where}: {problem}" for problem in problems[:MAX_PROBLEMS]]
        if more > 0:
            lines.append(f"{where}: and {more} more")
        raise RecipeError("\n".join(lines)) from None
    for key in PATH_KEYS:
        section, name = key.split(".")
        value = (data.get(section) or {}).get(name)
        if isinstance(value, str):
            recipe._written[key] = value
    return recipe


def canonical_json(recipe: Recipe) -> str:
    """The recipe with all defaults, keys sorted, paths as they were written (not resolved)."""
    data = recipe.model_dump(mode="json", by_alias=True)
    for key, written in recipe._written.items():
        section, name = key.split(".")
        data[section][name] = written
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of ``canonical_json``: the same recipe at another place has the same hash."""
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _apply_override(data: dict[str, Any], override: str, where: str) -> None:
    key, equals, text = override.partition("=")
    label = f"--set {_short(override)}"
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"{label}: write key=value, for example compress.budget.param_ratio=0.8")
    if len(text) > 10_000:
        raise RecipeError(f"{label}: the value is too long")
    value = strict_yaml.parse(text, label)
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    ):
        raise RecipeError(f"{label}: set a section's keys one by one, as {key}.KEY=VALUE")
    if key in PATH_KEYS and isinstance(value, str) and value:
        try:
            value = str(Path(value).expanduser().absolute())
        except RuntimeError:
            raise RecipeError(f"{label}: no such home folder") from None
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        node = _child(node, name, label, where)
    if isinstance(node, list):
        index = _index(node, last, label, where)
        if index == len(node):
            node.append(None)
        node[index] = value
    else:
        node[last] = value


def _child(node: Any, name: str, label: str, where: str) -> Any:
    """The container below ``name``, made where it is absent."""
    if isinstance(node, list):
        index = _index(node, name, label, where)
        if index == len(node):
            node.append({})
        child = node[index]
    else:
        if node.get(name) is None:
            node[name] = {}
        child = node[name]
    if not isinstance(child, dict | list):
        raise RecipeError(f"{label}: {name} of {where} is a single value and has no keys")
    return child


def _index(node: list[Any], name: str, label: str, where: str) -> int:
    if not name.isdecimal() or len(name) > 4 or int(name) > min(len(node), MAX_LIST):
        raise RecipeError(
            f"{label}: {_short(name)!r} is not an entry of a list of {len(node)} in {where} "
            f"(entries count from 0; {len(node)} adds one)"
        )
    return int(name)


def _problem(entry: Any) -> str:
    """One validation error as ``key.path: what is wrong; what to do``."""
    kind, given = entry["type"], entry.get("input")
    context = entry.get("ctx", {})
    loc = _readable(entry["loc"])
    key = ".".join(str(_short(part)) for part in loc) or "recipe"
    if kind == "extra_forbidden":
        known = _field_names(loc[:-1])
        return f"{key}: unknown key{_unknown_hint(str(loc[-1]), known)}"
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "literal_error":
        choices = _literal_choices(loc) or [str(context.get("expected", ""))]
        return f"{key}: {_not_one_of(given, choices)}"
    if kind == "union_tag_invalid":
        choices = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        tag = context["tag"]
        return f"{key}.{_tag_key(context)}: {_not_one_of(tag, choices)}"
    if kind == "union_tag_not_found":
        tag_key = _tag_key(context)
        tags = ", ".join(_tags(loc, tag_key))
        return f"{key}: {tag_key} is missing; add {tag_key}: one of {tags}"
    if kind == "value_error":
        return f"{key}: {context.get('error', entry['msg'])}"
    message = str(entry["msg"])
    message = message[:1].lower() + message[1:]
    message = message.replace("input should be", "must be").replace("tuple", "list")
    if kind in {"model_type", "model_attributes_type"}:
        message = "must be a mapping of keys to values"
    shown = "" if isinstance(given, dict | list | tuple) else f", not {_short(given)!r}"
    return f"{key}: {message}{shown}"


def _tag_key(context: dict[str, Any]) -> str:
    """The key that tells the entries of a list apart, such as ``format``."""
    return str(context["discriminator"]).strip("'")


def _tags(loc: Sequence[str | int], tag_key: str) -> list[str]:
    return [
        str(value)
        for model in _walk(loc)
        if tag_key in model.model_fields
        for value in _literals(model.model_fields[tag_key].annotation)
    ]


def _not_one_of(given: Any, choices: list[str]) -> str:
    hint = did_you_mean(given, choices) if isinstance(given, str) else ""
    if "did you mean" not in hint:
        hint = ""
    return f"{_short(given)!r} is not one of {', '.join(choices)}{hint}"


def _unknown_hint(name: str, known: list[str]) -> str:
    """A near name of the same section, else the section that has this very key, else all names."""
    hint = did_you_mean(name, known)
    if "did you mean" not in hint:
        elsewhere = [key for key in _all_keys(Recipe) if key.rpartition(".")[2] == name]
        if elsewhere:
            return f"; did you mean {elsewhere[0]!r}?"
    return hint


def _short(value: Any) -> Any:
    text = " ".join(str(value)[:200].split()) if isinstance(value, str) else value
    if isinstance(text, str) and len(text) > 60:
        return text[:57] + "..."
    return text


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation admits, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or isinstance(annotation, UnionType):
        for part in get_args(annotation):
            yield from _models_in(part)


def _walk(loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """The models that may stand at a place of the recipe."""
    here: list[type[BaseModel]] = [Recipe]
    for part in loc:
        if isinstance(part, int):
            continue
        below = [_field(model, part) for model in here]
        here = [
            model for field in below if field is not None for model in _models_in(field.annotation)
        ]
    return here


def _field(model: type[BaseModel], name: str) -> Any:
    for field_name, field in model.model_fields.items():
        if name == (field.alias or field_name):
            return field
    return None


def _field_names(loc: Sequence[str | int]) -> list[str]:
    names = (
        field.alias or name for model in _walk(loc) for name, field in model.model_fields.items()
    )
    return list(dict.fromkeys(names))


def _literal_choices(loc: Sequence[str | int]) -> list[str]:
    fields = [_field(model, str(loc[-1])) for model in _walk(loc[:-1])]
    choices: list[str] = []
    for field in fields:
        if field is not None:
            choices.extend(map(str, _literals(field.annotation)))
    return list(dict.fromkeys(choices))


def _literals(annotation: Any) -> Iterator[Any]:
    """The values of a Literal, also where it is optional."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _literals(part)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for below in _models_in(field.annotation):
            yield from _all_keys(below, f"{key}.")


def _readable(loc: Sequence[str | int]) -> list[str | int]:
    """The error's place without the tag that pydantic adds for an entry of a list of sections."""
    parts = list(loc)
    if len(parts) > 2 and parts[0] in {"export", "refine"} and isinstance(parts[1], int):
        del parts[2]
    return parts
