"""The keys of a recipe's ``export`` entries, one class a format."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from svdexport.recipe.section import Section as _Section

GgufType: TypeAlias = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K"
]
FileType: TypeAlias = Literal[
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q4_0",
    "IQ4_NL",
    "Q3_K",
    "Q2_K",
    "mixed",
]


_DEFAULT_BLOCK: dict[Any, int] = {"int2": 128}


class GgufExport(_Section):
    """A GGUF file; ``type`` is that of the linears' weights, factors included.

    ``mixed``: the types that a budget in bytes chose, Q4_0 for what it did not choose.

    ``type_a``, ``type_b``: another type for the first or second factors. ``embedding_type``,
    ``head_type``: for the token embedding and the output head; without them they get what
    llama.cpp's own quantiser gives them (a tied embedding counts as the head). ``form``: ``pairs``
    needs the llama.cpp that svdexport builds; ``stock`` writes the reconstructed dense weights,
    and ``stock_lora`` a quantised base with the pairs as a LoRA adapter in a second file, both for
    an unchanged llama.cpp. ``base`` is that of ``stock_lora``: ``residual`` quantises what the
    pairs leave, W - B A; ``weight`` quantises W, and the adapter's pairs, of the same ranks, are
    fitted anew to what that loses. ``importance``: weight the quantisation error of
    each input channel by its mean square in the calibration, for the types that take weights.
    ``fuse``: q, k and v that share an A stand in the file as one pair, which is two products for
    llama.cpp instead of four, and so do gate and up; without it LoRA adapters of q, k or v can be
    put on the file.
    """

    format: Literal["gguf"] = "gguf"
    type: FileType = "Q8_0"
    type_a: GgufType | None = None
    type_b: GgufType | None = None
    embedding_type: GgufType | None = None
    head_type: GgufType | None = None
    form: Literal["pairs", "stock", "stock_lora"] = "pairs"
    base: Literal["residual", "weight"] = "residual"
    importance: bool = True
    fuse: bool = True

    @model_validator(mode="after")
    def _base_of_an_adapter(self) -> GgufExport:
        if self.base != "residual" and self.form != "stock_lora":
            raise ValueError("base: is for form: stock_lora only")
        return self

    @model_validator(mode="after")
    def _mixed_types(self) -> GgufExport:
        keys = ("type_a", "type_b", "embedding_type", "head_type")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.type == "mixed" and given:
            raise ValueError(
                f"type: mixed takes every type from compress.budget.types; leave out {given[0]}"
            )
        return self

    @property
    def all_float(self) -> bool:
        """Whether neither linears nor factors are quantised."""
        asked = {self.type, self.type_a or self.type, self.type_b or self.type}
        return asked <= {"F32", "F16", "BF16"}

    @property
    def label(self) -> str:
        """Type and what differs from the defaults, for file names: ``Q4_0``, ``Q4_0-b-Q8_0``."""
        parts = {
            "a": self.type_a,
            "b": self.type_b,
            "embedding": self.embedding_type,
            "head": self.head_type,
        }
        given = [f"-{key}-{value}" for key, value in parts.items() if value is not None]
        form = "" if self.form == "pairs" else f"-{self.form.replace('_', '-')}"
        plain = "" if self.importance else "-plain"
        apart = "" if self.fuse else "-apart"
        base = "" if self.base == "residual" else f"-{self.base}"
        return f"{self.type}{''.join(given)}{form}{base}{plain}{apart}"


class OnnxExport(_Section):
    """An ONNX folder for onnxruntime and onnxruntime-genai.

    ``precision`` is that of the linears' weights, factors included; ``fp16`` is for WebGPU, the
    CPU gains no speed by it. ``block_size``: weights that share a scale; where it is left out 32,
    and 128 at 2 bits, where onnxruntime's kernel is fastest. ``operators``: ``standard`` writes
    ONNX's own operators alone (DequantizeLinear and MatMul), for runtimes that do not have
    Microsoft's. ``mobile`` adds a folder with the model in ORT format and the list of operators
    that a small build of onnxruntime for a phone needs. ``kv_cache: latent`` caches A x instead
    of B A x where v is a pair of small rank and applies B after attention; plain onnxruntime only.
    """

    format: Literal["onnx"] = "onnx"
    precision: Literal["fp32", "fp16", "int8", "int4", "int2"] = "int4"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    operators: Literal["contrib", "standard"] = "contrib"
    mobile: bool = False
    kv_cache: Literal["full", "latent"] = "full"

    @model_validator(mode="before")
    @classmethod
    def _block_by_precision(cls, data: Any) -> Any:
        if isinstance(data, dict) and "block_size" not in data:
            return {**data, "block_size": _DEFAULT_BLOCK.get(data.get("precision"), 32)}
        return data

    @property
    def label(self) -> str:
        """Precision and what differs from the defaults, for file names: ``int4-standard``."""
        default = _DEFAULT_BLOCK.get(self.precision, 32)
        block = "" if self.block_size == default else f"-b{self.block_size}"
        standard = "" if self.operators == "contrib" else "-standard"
        latent = "" if self.kv_cache == "full" else "-latent"
        return f"{self.precision}{block}{standard}{latent}{'-mobile' if self.mobile else ''}"


class CheckpointExport(_Section):
    """A Hugging Face folder; ``source`` keeps the source model's dtype.

    ``layout: remapped`` stores a pair of rank k in k max(m, n) slots of 16 bits, mostly two 8-bit
    entries a slot (Dobi-SVD's remapping). Budgets and ranks of the whole recipe then count those
    slots, and any rank below the full one saves bytes; other exports do not go with it.
    """

    format: Literal["checkpoint"] = "checkpoint"
    dtype: Literal["source", "float32", "float16", "bfloat16"] = "source"
    layout: Literal["factors", "remapped"] = "factors"


Export: TypeAlias = Annotated[
    GgufExport | OnnxExport | CheckpointExport, Field(discriminator="format")
]
