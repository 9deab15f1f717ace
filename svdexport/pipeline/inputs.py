"""What a run reads, by which finished work is told from stale: files, and versions of libraries.

Nothing heavy is imported here: a run that was published is recognised at once.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from svdexport import __version__
from svdexport.files import stamp
from svdexport.recipe import Recipe

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "gguf",
    "llama-cpp-python",
)


def versions() -> dict[str, str]:
    """Versions of what decides the results."""
    found = {"svdexport": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def texts_stamp(recipe: Recipe) -> list[list[tuple[str, int, int]]]:
    """Stamps of the text files and data sets that a recipe names."""
    paths: tuple[Path | None, ...]
    paths = (recipe.calibration.file, recipe.calibration.dataset, recipe.evaluate.text)
    return [stamp(path) for path in paths]


def inputs_key(recipe: Recipe) -> str:
    """Hash of the model's files and the texts by name, size and time, and of all versions."""
    model = stamp(recipe.model.gguf or recipe.model.path)
    text = json.dumps([model, texts_stamp(recipe), versions()])
    return hashlib.sha256(text.encode()).hexdigest()
