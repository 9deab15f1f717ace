"""The keys of ``compress.budget``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from svdexport.recipe.patterns import as_tuple
from svdexport.recipe.section import Section
from svdexport.recipe.values import Bytes

MixedType: TypeAlias = Literal[
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K"
]
Form: TypeAlias = Literal["dense", "pair", "residual"]
FORMS: tuple[Form, ...] = ("dense", "pair")


class Budget(Section):
    """How much to keep, how large the file may be, or how much faster a token is to come.

    With ``bytes`` form, rank and type of every matrix are chosen, embedding and head among them,
    for the one GGUF export of type ``mixed``; ``types`` are those to choose from. A file of types
    with fast kernels (Q4_0, IQ4_NL, Q4_K on x86) can be faster than the best of its size.
    ``forms`` likewise: a linear stays ``dense`` or becomes a ``pair``, or, where ``residual`` is
    asked for, both: a quantised matrix and a pair for what that loses.
    """

    param_ratio: float | None = Field(
        default=None, gt=0, le=1, description="kept share of the factorised linears' parameters"
    )
    bytes: Bytes | None = None
    speedup: float | None = Field(
        default=None, gt=1, le=100, description="of one token, predicted by timing products here"
    )
    types: Annotated[tuple[MixedType, ...], BeforeValidator(as_tuple)] | None = Field(
        default=None, min_length=1, description="with bytes; all without it"
    )
    forms: Annotated[tuple[Form, ...], BeforeValidator(as_tuple)] = Field(
        default=FORMS, min_length=1, description="with bytes"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        given = [v for v in (self.param_ratio, self.bytes, self.speedup) if v is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of param_ratio, bytes and speedup")
        if self.types is not None and self.bytes is None:
            raise ValueError("types is for a budget in bytes")
        if self.forms != FORMS and self.bytes is None:
            raise ValueError("forms is for a budget in bytes")
        return self
