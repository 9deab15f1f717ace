"""The keys of a recipe, as strict and frozen pydantic models.

A key exists here only where the code reads it. Sizes are bytes, lengths are tokens. ``param_ratio``
is the share of the factorised linears' parameters that is KEPT (papers quote kept or removed).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from svdexport.recipe.budget import Budget
from svdexport.recipe.exports import CheckpointExport, Export, GgufExport
from svdexport.recipe.patterns import Patterns, as_tuple
from svdexport.recipe.refiners import Refine, Tune
from svdexport.recipe.section import Section as _Section
from svdexport.recipe.settings import (
    ALLOCATION_SETTINGS,
    METHOD_SETTINGS,
    Settings,
    settings_of,
    settings_schema,
)
from svdexport.recipe.values import Bytes, Precision, RecipePath


def _one_or_more(value: Any) -> Any:
    """A single section stands for a list of one."""
    return (value,) if isinstance(value, dict) else as_tuple(value)


Count: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]


class Model(_Section):
    """The model: a Hugging Face folder, or a GGUF file."""

    path: RecipePath | None = None
    gguf: RecipePath | None = None
    trust_remote_code: bool = False
    hub_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        max_length=200,
        description="owner/name on the Hugging Face Hub, for the model card's base_model",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.gguf is None):
            raise ValueError("give exactly one of path (a model folder) and gguf (a file)")
        return self


class Calibration(_Section):
    """Text that moments are taken over; ``self`` is text that the model itself writes."""

    source: Literal["self", "file", "dataset"] = "self"
    file: RecipePath | None = None
    dataset: RecipePath | None = Field(
        default=None, description="a folder that the datasets package can load"
    )
    split: str = Field(default="train", min_length=1, max_length=200)
    column: str = Field(default="text", min_length=1, max_length=200)
    samples: int = Field(default=64, ge=1, le=10**6)
    length: int = Field(default=512, ge=8, le=10**6)
    seed: int = Field(default=0, ge=0, lt=2**32)
    batch: int = Field(default=8, ge=1, le=4096)
    precision: Precision = Field(
        default="float32", description="of the model's products; statistics are never in less"
    )

    @model_validator(mode="after")
    def _source_given(self) -> Calibration:
        for name in ("file", "dataset"):
            given = getattr(self, name) is not None
            if self.source == name and not given:
                raise ValueError(f"source is {name}, so {name} must say which")
            if self.source != name and given:
                raise ValueError(f"{name} is given but source is {self.source}; set source: {name}")
        return self


# methods that are an optimum in the metric of the inputs, which can be taken anew in sequence
SEQUENTIAL = ("svd_llm", "kfac_svd")


class Compress(_Section):
    """What is factorised, how, and how the budget is shared out."""

    method: Literal[
        "none",
        "svd",
        "fwsvd",
        "tfwsvd",
        "asvd",
        "svd_llm",
        "svd_llm_v2",
        "adasvd",
        "dobi_svd",
        "basis_sharing",
        "lorc",
        "emb_ae",
        "kfac_svd",
    ] = "kfac_svd"
    settings: Annotated[
        SerializeAsAny[Settings], WithJsonSchema(settings_schema(METHOD_SETTINGS))
    ] = Field(default={}, validate_default=True, description="keys of the method's own")  # type: ignore[assignment]
    group: bool = Field(default=True, description="linears that share an input share one A")
    targets: Patterns = Field(default=("re:.*",), min_length=1, max_length=1000)
    ignore: Patterns = Field(default=("lm_head",), max_length=1000)
    budget: Budget | None = Field(default=None, description="left out with method none only")
    allocate: Literal["uniform", "greedy", "svd_llm_v2", "adacr", "asvd", "dobi_svd", "lorc"] = (
        "greedy"
    )
    allocation: Annotated[
        SerializeAsAny[Settings], WithJsonSchema(settings_schema(ALLOCATION_SETTINGS))
    ] = Field(default={}, validate_default=True, description="keys of the strategy's own")  # type: ignore[assignment]
    rank_multiple: int = Field(default=32, ge=1, le=4096)
    damping: float = Field(
        default=0.1,
        ge=0,
        le=10,
        description="of kfac_svd: added to the moments of the output gradients, as a share of "
        "their mean eigenvalue",
    )
    sequential: bool = Field(
        default=False,
        description="once ranks are chosen, factor every group anew for the inputs that it has "
        "behind the compressed layers before it; dense linears are fitted too",
    )
    stream: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="read one block's weights at a time; auto: where half of the free memory would "
        "not hold the model",
    )

    @model_validator(mode="after")
    def _budget_given(self) -> Compress:
        if self.method == "none" and self.budget is not None:
            raise ValueError("method is none, which compresses nothing: leave out budget")
        if self.method != "none" and self.budget is None:
            raise ValueError("budget is missing; write for example budget: {param_ratio: 0.8}")
        return self

    @property
    def kept(self) -> float:
        """Share of the linears' parameters to keep; 1 where it is not what the budget limits."""
        given = None if self.budget is None else self.budget.param_ratio
        return 1.0 if given is None else given

    @property
    def by_bytes(self) -> bool:
        """Whether the file's bytes are the budget."""
        return self.budget is not None and self.budget.bytes is not None

    @field_validator("settings", "allocation", mode="plain")
    @classmethod
    def _own_keys(cls, value: Any, info: ValidationInfo) -> Settings:
        owner, known = {
            "settings": ("method", METHOD_SETTINGS),
            "allocation": ("allocate", ALLOCATION_SETTINGS),
        }[str(info.field_name)]
        if owner not in info.data:  # that key has an error of its own
            return Settings()
        return settings_of(info.data[owner], value, known)

    @model_validator(mode="after")
    def _in_sequence(self) -> Compress:
        if self.sequential and self.method not in SEQUENTIAL:
            raise ValueError(f"sequential: true goes with method {', '.join(SEQUENTIAL)}")
        return self

    @model_validator(mode="after")
    def _speed_can_be_chosen(self) -> Compress:
        if self.budget is not None and self.budget.speedup is not None:
            if self.allocate == "dobi_svd":
                raise ValueError("budget.speedup: allocate dobi_svd learns for a given param_ratio")
            if self.method == "emb_ae":
                raise ValueError("budget.speedup: a low-rank embedding makes no token faster")
        return self


class Quantize(_Section):
    """Weights onto the exports' grids before they are written; without it each format's own way.

    ``gptq`` hands each column's rounding error on to the next in the metric of the calibration's
    inputs, then visits the columns ``sweeps`` times again; ``rtn`` rounds to nearest with scales
    searched by the inputs' mean squares. ``damping`` is added to the moments, as a share of their
    mean. ``order``: columns by falling mean square of their input, or from left to right.
    ``sequential``: each linear is fitted anew to what it meets behind those quantised before it.
    ``tune``: the norms of each GGUF are then trained towards the dense model's logits.
    """

    algorithm: Literal["gptq", "rtn"] = "gptq"
    damping: float = Field(default=0.001, ge=0, le=10)
    order: Literal["activation", "natural"] = "activation"
    sweeps: int = Field(default=1, ge=0, le=100)
    sequential: bool = False
    tune: Tune | None = None

    @model_validator(mode="after")
    def _sequential_with_gptq(self) -> Quantize:
        if self.sequential and self.algorithm != "gptq":
            raise ValueError("sequential: true goes with algorithm: gptq")
        return self


class Evaluate(_Section):
    """Perplexity and KL divergence: ``windows`` consecutive windows of ``context`` tokens."""

    text: RecipePath | None = Field(
        default=None, description="without it: held-out text of the model"
    )
    context: int = Field(default=512, ge=8, le=10**6)
    windows: Count = 4


class Speed(_Section):
    """The timing protocol: interleaved rounds, prompts of ``prefill`` tokens, ``decode`` steps."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    rounds: int = Field(default=9, ge=1, le=1000)
    prefill: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = Field(
        default=(128, 512), min_length=1, max_length=16
    )
    decode: Count = 64


class Baselines(_Section):
    """What the compressed files are compared with, beside their dense twins.

    ``plain``: the dense model, plainly quantised to about the same size: timed and scored
    (``full``), scored alone (``quality``), or left out (``off``).
    """

    plain: Literal["full", "quality", "off"] = "full"


class Gates(_Section):
    """Limits that a run must keep; one that is left out is not checked."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    max_mean_kld: float | None = Field(default=None, gt=0)
    min_same_top: float | None = Field(default=None, gt=0, le=1)
    min_cosine: float | None = Field(
        default=None, gt=0, le=1, description="of an encoder: mean cosine to dense embeddings"
    )
    min_rank_correlation: float | None = Field(
        default=None, gt=0, le=1, description="of an encoder: Spearman's, of similarities"
    )
    min_prefill_speedup: float | None = Field(default=None, gt=0)
    min_decode_speedup: float | None = Field(default=None, gt=0)
    max_bytes: Bytes | None = None


class Recipe(_Section):
    """Everything that decides a run."""

    schema_version: Literal[1] = Field(alias="schema")
    model: Model
    calibration: Calibration = Calibration()
    compress: Compress
    refine: Annotated[tuple[Refine, ...], BeforeValidator(_one_or_more)] = Field(
        default=(), max_length=8, description="one refiner, or several that run in this order"
    )
    quantize: Quantize | None = None
    export: Annotated[tuple[Export, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1, max_length=32
    )
    evaluate: Evaluate = Evaluate()
    speed: Speed = Speed()
    baselines: Baselines = Baselines()
    gates: Gates = Gates()

    # Key path -> path as it was written, so that the hash does not depend on where the recipe lies.
    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _something_is_quantised(self) -> Recipe:
        floats = ("fp32", "fp16")
        if self.quantize is not None and all(
            e.all_float if isinstance(e, GgufExport) else getattr(e, "precision", "fp32") in floats
            for e in self.export
        ):
            raise ValueError("quantize: no export has a quantised type; leave it out")
        return self

    @model_validator(mode="after")
    def _tuned_files(self) -> Recipe:
        if self.quantize is not None and self.quantize.tune is not None:
            others = [e for e in self.export if getattr(e, "form", "") not in ("pairs", "stock")]
            if others:
                raise ValueError(
                    "quantize.tune is for GGUF exports of form pairs or stock; leave out "
                    f"{others[0].format}"
                )
            floats = [e for e in self.export if isinstance(e, GgufExport) and e.all_float]
            if floats:
                raise ValueError(
                    "quantize.tune trains the norms between quantised weights; leave out the "
                    f"export of type {floats[0].type}"
                )
        return self

    @model_validator(mode="after")
    def _pairs_made_in_sequence(self) -> Recipe:
        if self.compress.sequential and any(entry.method == "als" for entry in self.refine):
            raise ValueError("refine als undoes compress.sequential; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _bytes_of_one_file(self) -> Recipe:
        if self.compress.method == "none" and self.refine:
            raise ValueError("compress.method is none: there is nothing to refine; leave it out")
        mixed = [e for e in self.export if isinstance(e, GgufExport) and e.type == "mixed"]
        if not self.compress.by_bytes:
            if mixed:
                raise ValueError("a GGUF of type mixed needs compress.budget: {bytes: ...}")
            return self
        if len(mixed) != 1 or mixed[0].form != "pairs":
            raise ValueError("compress.budget.bytes needs one export {format: gguf, type: mixed}")
        if self.compress.method != "kfac_svd" or self.quantize is None:
            raise ValueError(
                "compress.budget.bytes needs method: kfac_svd, whose losses compare across "
                "layers, and a quantize section"
            )
        if self.compress.allocate != "greedy":
            raise ValueError(
                "compress.budget.bytes chooses rank and type of every matrix itself; leave out "
                f"allocate: {self.compress.allocate}"
            )
        if self.compress.sequential and not self.quantize.sequential:
            raise ValueError(
                "compress.sequential with a budget in bytes needs quantize.sequential: true, where "
                "the pairs are made anew together with their types' rounding"
            )
        return self

    @property
    def remapped(self) -> bool:
        """Whether pairs are stored, and counted, in Dobi-SVD's remapped layout."""
        return any(isinstance(e, CheckpointExport) and e.layout == "remapped" for e in self.export)

    @model_validator(mode="after")
    def _remapped_alone(self) -> Recipe:
        if not self.remapped:
            return self
        others = [e for e in self.export if getattr(e, "layout", "factors") != "remapped"]
        if others:
            raise ValueError(
                "export: layout remapped counts ranks in its own bytes; other exports, here "
                f"format {others[0].format}, need a recipe of their own"
            )
        if self.compress.method in ("none", "emb_ae"):
            method = self.compress.method
            raise ValueError(f"export: layout remapped: {method} makes no pairs of linears")
        return self

    @model_validator(mode="after")
    def _embedding_exports(self) -> Recipe:
        formats = {export.format for export in self.export} - {"checkpoint"}
        if self.compress.method == "emb_ae" and formats:
            raise ValueError(
                "compress.method emb_ae makes a low-rank embedding, which no runtime behind "
                f"{' or '.join(sorted(formats))} has; export format: checkpoint alone"
            )
        if self.compress.method == "emb_ae" and self.refine:
            raise ValueError(
                "refine: refiners work on pairs of linears, and compress.method emb_ae makes none; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_timed(self) -> Recipe:
        if all(export.format == "checkpoint" for export in self.export):
            for name in ("min_prefill_speedup", "min_decode_speedup"):
                if getattr(self.gates, name) is not None:
                    raise ValueError(f"gates.{name}: a checkpoint is not timed; leave it out")
        return self

    @field_validator("export")
    @classmethod
    def _no_twins(cls, value: tuple[Export, ...]) -> tuple[Export, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same export is listed twice; keep one of them")
        return value
