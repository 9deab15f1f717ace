"""docs/recipe.md is the page that its tool writes, and has every key of a recipe."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from svdexport.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("recipe_page", ROOT / "tools" / "recipe_page.py")
assert spec is not None and spec.loader is not None
recipe_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe_page)


def test_the_page_is_up_to_date() -> None:
    assert recipe_page.PAGE.read_text(encoding="utf-8") == recipe_page.page()


def test_every_key_of_the_schema_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", recipe_page.page(), re.MULTILINE))
    sections = Recipe.model_json_schema()["$defs"].values()
    keys = {key for section in sections for key in section.get("properties", {})}
    assert {"min_decode_speedup", "param_ratio", "kv_cache"} <= keys
    assert keys <= rows
