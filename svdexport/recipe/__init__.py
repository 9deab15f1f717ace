"""Recipes: what a run does, as one strict YAML file."""

from svdexport.recipe.budget import Budget
from svdexport.recipe.exports import CheckpointExport, Export, GgufExport, OnnxExport
from svdexport.recipe.hints import did_you_mean
from svdexport.recipe.load import (
    canonical_json,
    json_schema,
    load_recipe,
    recipe_hash,
    validate,
)
from svdexport.recipe.refiners import Distill, Refine
from svdexport.recipe.schema import (
    Baselines,
    Calibration,
    Compress,
    Evaluate,
    Gates,
    Model,
    Quantize,
    Recipe,
    Speed,
)
from svdexport.recipe.values import parse_bytes

__all__ = [
    "Baselines",
    "Budget",
    "Calibration",
    "CheckpointExport",
    "Compress",
    "Distill",
    "Evaluate",
    "Export",
    "Gates",
    "GgufExport",
    "Model",
    "OnnxExport",
    "Quantize",
    "Recipe",
    "Refine",
    "Speed",
    "canonical_json",
    "did_you_mean",
    "json_schema",
    "load_recipe",
    "parse_bytes",
    "recipe_hash",
    "validate",
]
