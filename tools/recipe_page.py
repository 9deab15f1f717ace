"""Write docs/recipe.md, the page of all keys of a recipe, from the classes that read them.

python tools/recipe_page.py            writes the page
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from svdexport.recipe import schema
from svdexport.recipe.budget import Budget
from svdexport.recipe.exports import CheckpointExport, GgufExport, OnnxExport
from svdexport.recipe.refiners import Als, Distill, Lora, SequentialLs, Tune
from svdexport.recipe.settings import ALLOCATION_SETTINGS, METHOD_SETTINGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
HEAD = """# The recipe's keys

A recipe is a YAML file without tags, anchors or aliases; an unknown key is an error with a
suggestion. Only `schema: 1`, `model`, `compress` and `export` must be there. Paths are relative to
the recipe's folder, `~` is the home folder. Sizes are bytes, or `60MB` (10^6), `60MiB` (2^20).

On the command line `--set compress.budget.param_ratio=0.7` changes or adds a key,
`--set export.0.type=Q4_0` one of a list's entry, counted from 0, and
`--set gates.min_decode_speedup=null` removes one. The value is a YAML scalar or a list of them
(`--set 'speed.prefill=[128]'`); paths given there are relative to the current folder.

`svdexport schema` prints the same as a JSON schema, with which an editor completes and checks keys.
(This page is written by `tools/recipe_page.py`.)
"""
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", schema.Model),
    ("calibration", schema.Calibration),
    ("compress", schema.Compress),
    ("compress.budget", Budget),
    *((f"compress.settings of method: {k}", v) for k, v in METHOD_SETTINGS.items()),
    *((f"compress.allocation of allocate: {k}", v) for k, v in ALLOCATION_SETTINGS.items()),
    ("refine with method: distill", Distill),
    ("refine with method: lora", Lora),
    ("refine with method: als", Als),
    ("refine with method: sequential_ls", SequentialLs),
    ("quantize", schema.Quantize),
    ("quantize.tune", Tune),
    ("export with format: gguf", GgufExport),
    ("export with format: onnx", OnnxExport),
    ("export with format: checkpoint", CheckpointExport),
    ("evaluate", schema.Evaluate),
    ("speed", schema.Speed),
    ("baselines", schema.Baselines),
    ("gates", schema.Gates),
)
NOTES = {  # what no docstring says
    "model": """
Give one of `path` and `gguf`. `trust_remote_code`: the model's own Python code may run.""",
    "calibration": """
`samples` windows of `length` tokens, `batch` of them at a time. `split` and `column` are the data
set's.""",
    "compress": """
`targets` and `ignore` choose linears, each by its module's full path or by `re:` and a regular
expression that is searched for in it; what `ignore` names stays dense. Ranks are multiples of
`rank_multiple`.""",
    "compress.budget": """
Give one of `param_ratio`, `bytes` and `speedup`.""",
    "refine with method: distill": """
`refine` is one entry, or a list of them that run in its order.""",
    "export with format: gguf": """
`export` is a list with an entry for each file.""",
    "speed": """
Without `threads`: all cores that the process may use.""",
    "gates": """
`max_perplexity_ratio` is over the dense model's perplexity, `max_mean_kld` in nats a token,
`min_same_top` the share of positions with the dense model's first choice. Speedups are over the
dense twin. `max_bytes` is for each file.""",
}
HUGE = 10**5  # bounds from here on are there against typing errors alone
ELSEWHERE = {  # keys that have a table of their own
    "budget": "see [compress.budget](#compressbudget)",
    "settings": "the method's own keys, below",
    "allocation": "the strategy's own keys, below",
    "tune": "see [quantize.tune](#quantizetune)",
}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(name, model) for name, model in SECTIONS)])


def section(name: str, model: type[BaseModel]) -> str:
    """A heading, what the class says of itself, and a row for each key."""
    said = re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(documented(model)))
    rows = [
        f"| `{key}` | {kind} | {default} | {what} |" for key, kind, default, what in keys(model)
    ]
    said += f"\n{NOTES[name]}" if name in NOTES else ""
    return "\n".join(
        [f"## {name}\n", f"{said}\n", "| key | value | default | |", "|---|---|---|---|", *rows, ""]
    )


def documented(model: type[BaseModel]) -> str:
    """The class's docstring behind those of the classes that it takes keys from."""
    inherited = [c for c in reversed(model.__mro__[1:]) if getattr(c, "model_fields", None)]
    return "\n\n".join(inspect.cleandoc(c.__doc__ or "") for c in [*inherited, model])


def keys(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Of each key its name, the values that it takes, its default and its description."""
    whole = model.model_json_schema()
    for name, found in whole["properties"].items():
        field = model.model_fields[name]
        what = str(found.get("description", ""))
        if name in ELSEWHERE:
            yield name, ELSEWHERE[name], "", what
            continue
        default = "must be there" if field.is_required() else plain(found.get("default"))
        if get_args(field.annotation) == (field.default,):  # the entry's own name
            default = "names the entry"
        yield name, values(found, whole.get("$defs", {})), default, what


def plain(value: Any) -> str:
    """A default as it would be written in YAML; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value)}`".replace("|", "\\|")


def values(found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "$ref" in found:
        return values(known[found["$ref"].rsplit("/", 1)[1]], known)
    if "anyOf" in found:
        if {"integer", "string"} <= {one.get("type") for one in found["anyOf"]}:
            return "bytes, as `60000000` or `60MB`"
        return " or ".join(
            values(one, known) for one in found["anyOf"] if one.get("type") != "null"
        )
    if "enum" in found:
        return ", ".join(f"`{value}`" for value in found["enum"])
    if "const" in found:
        return f"`{found['const']}`"
    if found["type"] == "array":
        return f"list of: {values(found['items'], known)}"
    names = {"boolean": "true or false", "string": "text", "integer": "integer", "number": "number"}
    return names[found["type"]] + limits(found)


def limits(found: Mapping[str, Any]) -> str:
    """Bounds of a number."""
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    given = [
        f"{word} {found[key]}" for key, word in words.items() if abs(found.get(key, HUGE)) < HUGE
    ]
    return "".join(f", {bound}" for bound in given)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
