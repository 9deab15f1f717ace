"""Files of nested factors, one a block: where they are, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdexport.core.decompose import INPUT_DAMPING
from svdexport.core.lowrank import FactorPair
from svdexport.factorize import METHODS
from svdexport.files import atomic_file
from svdexport.models.blocks import InputGroup, Structure
from svdexport.recipe import Compress


def factors_file(folder: Path, block: int) -> Path:
    """File of the nested factors of one block."""
    return folder / f"block_{block:04d}.safetensors"


def save_factors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a block's factors, whole or not at all."""
    with atomic_file(path) as making:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, making)


def read_factors(path: Path, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of a factor file by the ends of their names; no other is read."""
    with safe_open(path, framework="pt") as file:
        wanted = [name for name in file.keys() if name.endswith(endings)]  # noqa: SIM118
        return {name: file.get_tensor(name).clone() for name in wanted}


def pair_at(compress: Compress, tensors: dict[str, Tensor], leader: str, rank: int) -> FactorPair:
    """A group's pair of a rank, from its tensors in the factor file."""
    a, b = tensors[f"{leader}.a"], tensors[f"{leader}.b"]
    pair = FactorPair(a[:rank].contiguous(), b[:, :rank].contiguous())
    finish = METHODS[compress.method].finish
    if finish is None:
        return pair
    prefix = f"{leader}.keep."
    kept = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    return finish(pair, kept, compress.settings)


def gradients_of(group: InputGroup, path: Path) -> list[Tensor] | None:
    """G of each member, as a sequential recipe's factor file keeps them; None without gradients."""
    names = [f"{member.name}.gradient" for member in group.members]
    found = read_factors(path, tuple(names))
    return [found[name].double() for name in names] if found else None


def importance(structure: Structure, folder: Path) -> dict[str, Tensor]:
    """Mean squares of input channels and of A x, from all blocks that have them."""
    found: dict[str, Tensor] = {}
    for block in range(len(structure.blocks)):
        if factors_file(folder, block).exists():
            found |= read_factors(factors_file(folder, block), (".inputs", ".rank"))
    return found


def moment_trouble(structure: Structure, folder: Path) -> Iterator[str]:
    """What was odd about the moments: those that needed damping, channels without a signal, and
    experts that got few tokens."""
    dampings: list[float] = []
    few: list[int] = []
    dead: dict[str, int] = {}
    for block in range(len(structure.blocks)):
        if not factors_file(folder, block).exists():
            continue
        for name, tensor in read_factors(
            factors_file(folder, block), (".damping", ".inputs", ".few")
        ).items():
            if name.endswith(".damping"):
                dampings.append(float(tensor))
            elif name.endswith(".few"):
                few.append(int(tensor))
            elif count := int((tensor == 0).sum()):
                dead[name.removesuffix(".inputs")] = count
    damped = [value for value in dampings if value > INPUT_DAMPING]
    if damped:
        yield (
            f"{len(damped)} of {len(dampings)} moments were singular and were damped, by up to "
            f"{max(damped):.0e} of their mean eigenvalue"
        )
    if few:
        yield (
            f"{len(few)} linears of experts got fewer calibration tokens than they have input "
            f"channels (the least {min(few)}): the moments of all experts of their layer stand in"
        )
    if dead:
        some = ", ".join(list(dead)[:3]) + (", ..." if len(dead) > 3 else "")
        yield (
            f"{len(dead)} linears have input channels that are zero on all of the calibration "
            f"text (up to {max(dead.values())}): {some}"
        )
