"""Runtimes that artifacts run on, behind one face."""

from __future__ import annotations

from pathlib import Path

from svdexport.errors import MissingExtraError, RecipeError
from svdexport.runtimes.artifact import kind
from svdexport.runtimes.base import Runtime

__all__ = ["NAMES", "Runtime", "open_runtime"]

NAMES = {
    "gguf": ("llama.cpp",),
    "onnx": ("onnxruntime", "onnxruntime-genai"),
    "checkpoint": ("torch",),
}


def open_runtime(
    path: Path,
    *,
    threads: int,
    context: int,
    runtime: str | None = None,
    trust_remote_code: bool = False,
) -> Runtime:
    """Load an artifact in its runtime (the first of its kind's, unless one is named).

    Args:
        context: longest sequence that will be run, in tokens.
        trust_remote_code: whether a checkpoint's own code may run.

    Raises:
        InputError: not an artifact, or the runtime refuses it.
        RecipeError: the named runtime does not take its format.
        MissingExtraError: the runtime is not installed.
    """
    form = kind(path)
    name = runtime or NAMES[form][0]
    if name not in NAMES[form]:
        raise RecipeError(
            f"--runtime {name}: {path} is {form}, it runs on {' or '.join(NAMES[form])}"
        )
    try:
        if name == "torch":
            from svdexport.runtimes.torch_rt import TorchRuntime

            return TorchRuntime(path, threads, trust_remote_code=trust_remote_code)
        if name == "llama.cpp":
            from svdexport.runtimes.llama_cpp_rt import LlamaCppRuntime

            return LlamaCppRuntime(path, threads=threads, context=context)
        from svdexport.runtimes.encoder_rt import is_encoder_graph

        if form == "onnx" and path.is_dir() and is_encoder_graph(path):
            from svdexport.runtimes.encoder_rt import EncoderRuntime

            return EncoderRuntime(path, threads=threads)
        if name == "onnxruntime":
            from svdexport.runtimes.ort_rt import OrtRuntime

            return OrtRuntime(path, threads=threads, context=context)
        from svdexport.runtimes.genai_rt import GenaiRuntime

        return GenaiRuntime(path, threads=threads, context=context)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("svdexport"):
            raise
        raise MissingExtraError("gguf" if form == "gguf" else "onnx", f"running {name}") from None
