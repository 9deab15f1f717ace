"""The keys of ``refine``: one section a refiner, chosen by ``method``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from svdexport.recipe.section import Section
from svdexport.recipe.values import Precision


class Training(Section):
    """How long and on what a refiner trains.

    ``steps`` alone gives the same bytes on the same kind of machine. With ``minutes`` alone the
    learning rate follows the clock; with both it follows the steps and the clock only ends it.
    ``batch`` windows of ``length`` tokens make a step. ``samples``: windows of the calibration
    source, when more of it is wanted than calibration took. ``precision`` is that of the products;
    weights and the optimiser's state stay float32.
    """

    steps: int | None = Field(default=None, ge=1, le=10**7)
    minutes: float | None = Field(default=None, gt=0, le=10**5)
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the training")
    batch: int = Field(default=4, ge=1, le=4096)
    length: int | None = Field(
        default=None, ge=8, le=10**6, description="tokens a window; else calibration.length"
    )
    samples: int | None = Field(default=None, ge=2, le=10**7)
    patience: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="checks on held-out text without gain (12 in all) in the second half",
    )
    precision: Precision = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _ends(self) -> Training:
        if self.steps is None and self.minutes is None:
            raise ValueError("say how long: give steps, minutes or both")
        return self


class Distill(Training):
    """Train the pairs towards the dense model's logits. ``train: linears`` trains with them the
    linears that stayed dense.
    """

    method: Literal["distill"] = "distill"
    train: Literal["pairs", "linears"] = "pairs"


class Tune(Training):
    """Train the gains of the norms behind weights that are quantised already."""

    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="of a gain's own size")
    batch: int = Field(default=1, ge=1, le=4096)


class Lora(Training):
    """SVD-LLM's update: a low-rank change of all B is trained and merged, then one of all A.

    Steps and minutes are shared out evenly between the two.
    """

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)


class Als(Section):
    """Alternating least squares in the metric of the calibration's moments (AdaSVD's adaComp)."""

    method: Literal["als"] = "als"
    iterations: int = Field(default=2, ge=1, le=1000)
    damping: float = Field(
        default=0.1,
        ge=0,
        le=10,
        description="added to the output gradients' moments, as a share of their mean eigenvalue",
    )


class SequentialLs(Section):
    """Every B refitted by least squares, block by block: from the inputs that the compressed model
    has there to the outputs that the original has.
    """

    method: Literal["sequential_ls"] = "sequential_ls"
    ridge: float = Field(
        default=1e-3,
        ge=0,
        le=10,
        description="pull towards the B from before, as a share of the mean square of A x",
    )


Refine: TypeAlias = Annotated[Distill | Als | SequentialLs | Lora, Field(discriminator="method")]
