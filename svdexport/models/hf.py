"""transformers integration: ``AutoModelForCausalLM.from_pretrained`` loads compressed checkpoints.

``import svdexport`` arranges for this module to be imported once transformers' registry is; it
registers itself.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from svdexport.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    EmbeddingSpec,
    PairSpec,
    experts_apart,
)
from svdexport.models.modules import replace_embedding, replace_linears
from svdexport.models.remapped import factors_for_slots, slots_for_factors


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` section of a compressed checkpoint (see svdexport.checkpoint)."""

    def __init__(
        self,
        quant_method: str = QUANT_METHOD,
        version: int = FORMAT_VERSION,
        low_rank: dict[str, dict[str, Any]] | None = None,
        embedding: dict[str, Any] | None = None,
        remapped: dict[str, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise ValueError(f"low-rank format version {version}; expected {FORMAT_VERSION}")
        self.quant_method = quant_method
        self.version = version
        self.low_rank = low_rank or {}
        self.embedding = embedding
        self.remapped = remapped


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linears by pairs before the weights are loaded into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        pairs = {
            name: PairSpec(int(entry["rank"]), str(entry["group"]))
            for name, entry in self.quantization_config.low_rank.items()
        }
        replace_linears(model, pairs)
        if self.quantization_config.remapped is not None:
            slots_for_factors(model, pairs)
        if self.quantization_config.embedding is not None:
            replace_embedding(model, EmbeddingSpec(**self.quantization_config.embedding))
        return model

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Experts that stand apart are not merged into a stack. Older releases pass no model."""
        found = super().update_weight_conversions(weight_conversions, *model)
        if not experts_apart(self.quantization_config.low_rank):
            return found
        return [c for c in found if not any(".experts.*." in s for s in c.source_patterns)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        shapes = self.quantization_config.remapped
        if shapes is not None:
            factors_for_slots(model, {name: (m, n) for name, (m, n) in shapes.items()})
            self.quantization_config.remapped = None  # what is saved from here on has factors
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make the quantizer known to transformers; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


register()
