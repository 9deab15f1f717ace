"""Which ggml type each tensor of an exported GGUF gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from svdexport.recipe import GgufExport
from svdexport.runtimes.ggml import fits
from svdexport.safety.gguf_header import GgufTensor

FLOATS = ("F32", "F16", "BF16")

# general.file_type, llama.h enum llama_ftype; the K types as their plain ("S") mix
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
}

MIXED_REST = "Q4_0"  # in a file of mixed types, what the byte budget did not choose; and its twin

# llama.cpp's own answer where a row is no whole number of a type's blocks
# (tensor_type_fallback in llama-quant.cpp); what fits neither becomes F16.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Matrices that llama.cpp never quantises (tensor_allows_quantization in llama-quant.cpp).
NOT_QUANTISED = (
    "_norm.weight",
    "ffn_gate_inp",
    "position_embd",
    "token_types",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.",
    "time_mix_",
    "attn_rel_b",
)


@dataclass(frozen=True)
class Types:
    """The types of an export: of A, of B, of dense linears, of the embedding and of the head."""

    linear: str
    a: str
    b: str
    embedding: str
    head: str

    @classmethod
    def of(cls, spec: GgufExport, tied: bool) -> Types:
        """From the recipe's entry. A tied embedding is the head, and gets the head's type.

        Without keys of their own, embedding and head are what ``llama_model_quantize`` makes
        them: the type itself, but the head (or tied embedding) Q6_K below Q8_0.
        """
        linear = MIXED_REST if spec.type == "mixed" else spec.type
        plain = linear in (*FLOATS, "Q8_0")
        head = spec.head_type or (linear if plain else "Q6_K")
        embedding = spec.embedding_type or (head if tied else linear)
        return cls(linear, spec.type_a or linear, spec.type_b or linear, embedding, head)

    def dense(self, name: str, info: GgufTensor) -> str:
        """The type asked for a dense tensor of the base; its own where it is not to be changed."""
        if len(info.ne) < 2 or not name.endswith(".weight"):
            return info.type
        if any(part in name for part in NOT_QUANTISED):
            return info.type
        if name == "token_embd.weight":
            return self.embedding
        return self.head if name == "output.weight" else self.linear


def file_type(type_name: str, sizes: Iterable[tuple[str, int]]) -> int:
    """``general.file_type``; of a mixed file, that of the type with the most bytes."""
    if type_name != "mixed":
        return FILE_TYPES[type_name]
    total: Counter[str] = Counter()
    for name, size in sizes:
        if name in FILE_TYPES:
            total[name] += size
    return FILE_TYPES[total.most_common(1)[0][0]]


def held(type_name: str, row_length: int) -> str:
    """The type itself, or what llama.cpp falls back to where it cannot hold rows of this length."""
    for candidate in (type_name, FALLBACK.get(type_name, type_name)):
        if fits(candidate, row_length):
            return candidate
    return "F16"
