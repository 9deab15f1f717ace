"""A model's tensors by name and shape, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdexport.models.blocks import Structure, discover
from svdexport.models.loader import skeleton


@dataclass(frozen=True)
class Shapes:
    """What can be known without weights.

    Attributes:
        structure: blocks, linears and shared inputs.
        parameters: name -> shape; a tied head is listed once, under the embedding's name.
        embedding: name of the token embedding. head: of the output head, None where it is tied.
        config: transformers' configuration.
    """

    structure: Structure
    parameters: dict[str, tuple[int, ...]]
    embedding: str
    head: str | None
    config: Any

    @property
    def count(self) -> int:
        """Parameters of the model."""
        total = 0
        for shape in self.parameters.values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total


def shapes_of(folder: Path, trust_remote_code: bool = False) -> Shapes:
    """Build the model on the meta device. Raises InputError where that is not possible."""
    model = skeleton(folder, trust_remote_code)
    structure = discover(model)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = {id(module): name for name, module in model.named_modules()}
    embedding = f"{names[id(model.get_input_embeddings())]}.weight"
    output = model.get_output_embeddings()
    head = None if output is None else f"{names[id(output)]}.weight"
    return Shapes(
        structure, parameters, embedding, head if head in parameters else None, model.config
    )
