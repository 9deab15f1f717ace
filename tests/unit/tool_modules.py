"""Scripts under tools/, which are no package, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_tool(path: str) -> ModuleType:
    """The module of a script, by its path below tools/."""
    file = ROOT / "tools" / path
    spec = importlib.util.spec_from_file_location(f"tool_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
