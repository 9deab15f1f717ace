"""What is checked before anything heavy is imported or anything is written.

A wrong or hostile input ends here, within a second or two and without a trace on the disk.
"""

from __future__ import annotations

from pathlib import Path

from svdexport.errors import InputError, RecipeError
from svdexport.recipe import Recipe
from svdexport.runtimes.artifact import kind
from svdexport.safety import (
    ModelFolder,
    check_config,
    check_file_finite,
    check_gguf,
    check_model_folder,
    check_onnx,
)
from svdexport.safety.paths import check_regular

# Names of learned positions in GPT-2 and its kin, OPT, and BERT and its kin.
POSITION_TABLES = (".wpe.weight", "embed_positions.weight", "position_embeddings.weight")


def check_inputs(recipe: Recipe, *, weights: bool = True, timed: bool = True) -> None:
    """The model's files and the texts that a recipe names.

    Args:
        weights: also look through all weights for NaN and infinity (a second for each 500 MB);
            without, a folder that has its configuration alone will do.
        timed: the exports are to be timed, so that ``speed.prefill`` counts.

    Raises:
        InputError: the model. RecipeError: a text, a data set, or a length beyond the model's
            positions.
    """
    model = recipe.model
    if model.path is not None and not weights and not any(model.path.glob("*.safetensors")):
        check_config(model.path, model.trust_remote_code)
    elif model.path is not None:
        folder = check_model_folder(model.path, model.trust_remote_code)
        check_lengths(recipe, folder, timed)
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


def check_lengths(recipe: Recipe, folder: ModelFolder, timed: bool) -> None:
    """Refuse, as RecipeError, sequences longer than a table of learned positions."""
    most = positions(folder)
    lengths = {
        "calibration.length": recipe.calibration.length,
        "evaluate.context": recipe.evaluate.context,
    }
    if timed and any(export.format != "checkpoint" for export in recipe.export):
        lengths["speed.prefill"] = max(recipe.speed.prefill)
    for key, length in lengths.items():
        if most is not None and length > most:
            raise RecipeError(
                f"{key}: {length} tokens, but {recipe.model.path} has learned {most} positions; "
                f"give at most {most}"
            )


def positions(folder: ModelFolder) -> int | None:
    """Tokens that a table of learned positions serves; None for a model without one."""
    config = folder.config
    if config.get("position_embedding_type") == "rotary":
        return None
    rows = [
        info.shape[0] for name, info in folder.tensors.items() if name.endswith(POSITION_TABLES)
    ]
    if not rows:
        return None
    stated = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    most = min([*rows, *(value for value in stated if type(value) is int)])
    # RoBERTa's positions begin behind the padding token's number.
    first = config.get("pad_token_id") if "roberta" in str(config.get("model_type")) else None
    return most - first - 1 if type(first) is int else most


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
