"""Nothing from a hostile file gets past here: checks before any library opens what a user gives."""

from svdexport.safety.finite import check_file_finite, check_finite
from svdexport.safety.headers import (
    GgufHeader,
    SafetensorsHeader,
    TensorInfo,
    check_gguf,
    check_onnx,
    check_safetensors,
)
from svdexport.safety.model_folder import ModelFolder, check_config, check_model_folder
from svdexport.safety.network import no_network

__all__ = [
    "GgufHeader",
    "ModelFolder",
    "SafetensorsHeader",
    "TensorInfo",
    "check_config",
    "check_file_finite",
    "check_finite",
    "check_gguf",
    "check_model_folder",
    "check_onnx",
    "check_safetensors",
    "no_network",
]
