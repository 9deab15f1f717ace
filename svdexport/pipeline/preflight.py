"""What is checked before anything heavy is imported or anything is written.

A wrong or hostile input ends here, within a second or two and without a trace on the disk.
"""

from __future__ import annotations

from pathlib import Path

from svdexport.errors import InputError, RecipeError
from svdexport.recipe import Recipe
from svdexport.runtimes.artifact import kind
from svdexport.safety import (
    check_config,
    check_file_finite,
    check_gguf,
    check_model_folder,
    check_onnx,
)
from svdexport.safety.paths import check_regular


def check_inputs(recipe: Recipe, *, weights: bool = True) -> None:
    """The model's files and the texts that a recipe names.

    Args:
        weights: also look through all weights for NaN and infinity (a second for each 500 MB);
            without, a folder that has its configuration alone will do.

    Raises:
        InputError: the model. RecipeError: a text or a data set.
    """
    model = recipe.model
    if model.path is not None and not weights and not any(model.path.glob("*.safetensors")):
        check_config(model.path, model.trust_remote_code)
    elif model.path is not None:
        folder = check_model_folder(model.path, model.trust_remote_code)
        for header in folder.headers if weights else ():
            check_file_finite(header)
    elif model.gguf is not None:
        check_gguf(model.gguf)
    for key, path in (
        ("calibration.file", recipe.calibration.file),
        ("evaluate.text", recipe.evaluate.text),
    ):
        if path is not None:
            check_text(path, key)
    data = recipe.calibration.dataset
    if data is not None and not data.exists():
        raise RecipeError(f"calibration.dataset: {data}: no such file or folder")


def check_text(path: Path, key: str) -> None:
    """A UTF-8 text file with something in it. Raises RecipeError naming the recipe's key."""
    try:
        check_regular(path)
        empty = True
        with path.open(encoding="utf-8") as file:
            while block := file.read(2**20):  # to the end: all of it must be UTF-8
                empty = empty and block.isspace()
    except InputError as error:
        raise RecipeError(f"{key}: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{key}: {path}: not UTF-8 text ({error.reason}); convert it") from None
    if empty:
        raise RecipeError(f"{key}: {path}: the text is empty")


def check_artifact(path: Path) -> None:
    """The headers of a GGUF file, ONNX model or checkpoint folder. Raises InputError."""
    form = kind(path)
    if form == "gguf":
        check_gguf(path)
    elif form == "onnx":
        check_onnx(path)
    else:
        check_model_folder(path)
