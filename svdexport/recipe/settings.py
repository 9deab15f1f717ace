"""Keys that belong to one method (``compress.settings``) or one allocation strategy
(``compress.allocation``). A method without an entry here takes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from svdexport.recipe.hints import did_you_mean
from svdexport.recipe.patterns import Patterns, as_tuple

# Where a block's result returns to the residual stream: the paper found that sharing hurts there.
APART = ("re:(^|[._])(o_proj|down_proj|out_proj|c_proj|fc2|dense|dense_4h_to_h)$",)


Shares: TypeAlias = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(as_tuple)
]


class Settings(BaseModel):
    """No keys: the base of all, and what a method without keys of its own gets."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


NO_SETTINGS = Settings()


class Asvd(Settings):
    """ASVD: channels are scaled by their mean absolute value to the power of ``alpha``."""

    alpha: float = Field(default=0.5, ge=0, le=2)


class Adasvd(Settings):
    """AdaSVD: how often adaComp updates both factors, beginning at the plain SVD."""

    iterations: int = Field(default=5, ge=1, le=1000)


class Tfwsvd(Settings):
    """TFWSVD: rounds of alternating least squares, and conjugate-gradient steps in each half."""

    iterations: int = Field(default=3, ge=1, le=1000)
    steps: int = Field(default=4, ge=1, le=1000)


class DobiSvd(Settings):
    """Dobi-SVD: input rows that the PCA of the outputs sees, in parts of ``part`` rows."""

    rows: int = Field(default=8192, ge=1, le=10**7)
    part: int = Field(default=2048, ge=1, le=10**6)


class BasisSharing(Settings):
    """Basis sharing: adjacent blocks that share, linears that do not, and the refit of B."""

    layers: int = Field(default=2, ge=1, le=64)
    apart: Patterns = Field(default=APART, max_length=100)
    refit: bool = False


class KfacSvd(Settings):
    """Loss-aware SVD: whose next tokens the gradients are of.

    ``text``: the calibration text's. ``both``: these and tokens drawn from the model's own
    prediction, the mean of the two moments, each over its trace; a second backward pass.
    """

    labels: Literal["text", "both"] = "text"


class EmbAe(Settings):
    """Low-rank embedding: steps that raise the summed cosines, beginning at the plain SVD."""

    iterations: int = Field(default=10, ge=0, le=1000)


METHOD_SETTINGS: dict[str, type[Settings]] = {
    "tfwsvd": Tfwsvd,
    "asvd": Asvd,
    "adasvd": Adasvd,
    "dobi_svd": DobiSvd,
    "basis_sharing": BasisSharing,
    "emb_ae": EmbAe,
    "kfac_svd": KfacSvd,
}


class Adacr(Settings):
    """adaCR: the least important block keeps at least ``min_ratio`` of its parameters."""

    min_ratio: float = Field(default=0.3, ge=0, le=1)


class AsvdTrials(Settings):
    """ASVD: kept shares to try on each group, and how much of the calibration text to try on."""

    ratios: Shares = Field(default=(0.2, 0.4, 0.6, 0.8), min_length=1, max_length=32)
    samples: int = Field(default=2, ge=1, le=10**4)
    length: int = Field(default=128, ge=8, le=10**6)


class DobiPositions(Settings):
    """Dobi-SVD: descent on the truncation positions; ``rate`` is in ranks a step."""

    iterations: int = Field(default=20, ge=1, le=10**6)
    samples: int = Field(default=4, ge=1, le=10**4)
    length: int = Field(default=512, ge=8, le=10**6)
    rate: float = Field(default=4.0, gt=0, le=1000)
    beta: float = Field(default=10.0, gt=0, le=1000)
    ratio_weight: float = Field(default=100.0, ge=0, le=10**6)
    range_weight: float = Field(default=100.0, ge=0, le=10**6)


class LorcDepth(Settings):
    """LoRC: share of the shallowest block's width that the deepest keeps; blocks left dense."""

    min_ratio: float = Field(default=0.25, gt=0, le=1)
    protect: int = Field(default=0, ge=0, le=10**4)


ALLOCATION_SETTINGS: dict[str, type[Settings]] = {
    "adacr": Adacr,
    "asvd": AsvdTrials,
    "dobi_svd": DobiPositions,
    "lorc": LorcDepth,
}


def settings_of(name: str, value: Any, known: Mapping[str, type[Settings]]) -> Settings:
    """The settings that ``value`` (a mapping) gives for the method or strategy ``name``.

    Raises ValueError for a key that it does not have, ValidationError for a wrong value.
    """
    model = known.get(name, Settings)
    if isinstance(value, Settings):
        value = value.model_dump()
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of keys to values")
    for key in value:
        if key not in model.model_fields:
            if not model.model_fields:
                raise ValueError(f"{name} has no settings, so not {str(key)[:60]!r} either")
            raise ValueError(
                f"{name} has no key {str(key)[:60]!r}{did_you_mean(str(key), model.model_fields)}"
            )
    return model.model_validate(dict(value))


def settings_schema(known: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """JSON schema of the settings of any of the known names, for editors."""
    return {
        "anyOf": [
            *(model.model_json_schema() for model in known.values()),
            {"type": "object", "maxProperties": 0},
        ]
    }
