"""docs/recipe.md is the page that its tool writes, and has every key of a recipe."""

from __future__ import annotations

import re

from svdexport.recipe import Recipe
from tests.unit.tool_modules import load_tool

recipe_page = load_tool("recipe_page.py")


def test_the_page_is_up_to_date() -> None:
    assert recipe_page.PAGE.read_text(encoding="utf-8") == recipe_page.page()


def test_every_key_of_the_schema_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", recipe_page.page(), re.MULTILINE))
    sections = Recipe.model_json_schema()["$defs"].values()
    keys = {key for section in sections for key in section.get("properties", {})}
    assert {"min_decode_speedup", "param_ratio", "kv_cache"} <= keys
    assert keys <= rows
