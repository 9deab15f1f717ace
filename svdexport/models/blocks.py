"""The structure of a decoder, found by running it: blocks, linears, and which share an input.

The model runs once on the meta device (shapes only, no weights), so that a configuration alone
is enough and nothing depends on the names an architecture gives its layers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.linears import is_linear
from svdexport.errors import InputError
from svdexport.models.experts import Experts, stack_of
from svdexport.models.modules import linear_shape

Call = tuple[int, str, Tensor]  # block, path of a linear within the block, its input


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: ``name`` is its module path in the model.

    ``stack``: of an expert's linear, the name that it shares with its like in the layer's other
    experts. They stand in one tensor of an exported file, and so must have one rank.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    stack: str | None = None

    @property
    def params(self) -> int:
        """Weight parameters; a bias stays as it is and is not counted."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that are called with the same tensor, in the order of the calls."""

    block: int
    members: tuple[Linear, ...]

    @property
    def leader(self) -> str:
        return self.members[0].name

    @property
    def stack(self) -> str | None:
        """Name of the stack of experts' linears that the first member belongs to."""
        return self.members[0].stack


@dataclass(frozen=True)
class Structure:
    """What is found by running a model.

    Attributes:
        blocks: module paths, in order. groups: linears that share an input.
        returns_tuple: whether a block returns one.
        embedding: the token embedding as a linear of one-hot inputs (out: width, in: tokens), or
            None where it is not a plain table. tied_head: path of the head that shares its table.
    """

    blocks: tuple[str, ...]
    groups: tuple[InputGroup, ...]
    returns_tuple: bool
    embedding: Linear | None = None
    tied_head: str | None = None

    def of_block(self, block: int) -> list[InputGroup]:
        return [group for group in self.groups if group.block == block]

    def linears(self) -> Iterator[Linear]:
        for group in self.groups:
            yield from group.members


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the decoder blocks: the longest ModuleList that is not inside another.

    Raises InputError where the model has no ModuleList.
    """
    lists = [(name, len(m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    names = {name for name, _ in lists}
    outer = [
        (name, length)
        for name, length in lists
        if not any(name.startswith(other + ".") for other in names)
    ]
    if not outer:
        raise InputError("the model has no list of blocks: its structure is not known to svdexport")
    name, length = max(outer, key=lambda item: item[1])
    return tuple(f"{name}.{i}" for i in range(length))


def discover(model: nn.Module) -> Structure:
    """Find blocks, linears and shared inputs by one forward pass of 8 tokens.

    Args:
        model: a causal language model on any device; on meta it needs no weights.
    """
    blocks = find_blocks(model)
    twins = _twins(model, blocks)
    device = next(model.parameters()).device
    calls: list[Call] = []  # keeps the inputs alive, so identities are unique
    outputs: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        for index, path in enumerate(blocks):
            block = model.get_submodule(path)
            if twins[index] != index:  # what its twin returned has the shapes that it would return

                def again(*_a: Any, twin: int = twins[index], **_k: Any) -> Any:
                    return outputs[twin]

                block.forward = again  # type: ignore[method-assign]
                stack.callback(block.__dict__.pop, "forward")
                continue

            def note_output(_m: nn.Module, _a: Any, output: Any, key: int = index) -> None:
                outputs[key] = output

            stack.callback(block.register_forward_hook(note_output).remove)
            for name, module in block.named_modules():
                if not is_linear(module):
                    continue

                def note_input(
                    _m: nn.Module, args: Any, kwargs: Any, key: tuple[int, str] = (index, name)
                ) -> None:
                    calls.append((*key, args[0] if args else kwargs["input"]))

                hook = module.register_forward_pre_hook(note_input, with_kwargs=True)
                stack.callback(hook.remove)
        for mixture in [m for m in model.modules() if isinstance(m, Experts)]:
            mixture.every = True  # whatever the router chooses for these tokens
            stack.callback(setattr, mixture, "every", False)
        tokens = torch.zeros((1, 8), dtype=torch.long, device=device)
        mask = torch.ones_like(tokens)
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            mask = torch.zeros((1, 1, 8, 8), device=device)  # an encoder's, ready made: see below
        with torch.no_grad(), _eager_attention(model):
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    embedding, head = _embedding(model)
    returns_tuple = isinstance(outputs[twins[-1]], tuple)
    groups = tuple(_group(model, blocks, twins, calls))
    return Structure(blocks, groups, returns_tuple, embedding, head)


def _twins(model: nn.Module, blocks: Sequence[str]) -> list[int]:
    """For each block the first one of the same modules, shapes and settings; it may be itself.

    Settings are the plain attributes of its modules, but for those that count the layers. In a
    model of 80 layers one or two run instead of all.
    """
    first: dict[Any, int] = {}
    return [
        first.setdefault(_signature(model.get_submodule(path), index), index)
        for index, path in enumerate(blocks)
    ]


def _signature(block: nn.Module, index: int) -> tuple[Any, ...]:
    found: list[Any] = [index] if "forward" in block.__dict__ else []  # hooked: like no other
    for name, module in block.named_modules():
        shapes = tuple((key, p.shape) for key, p in module.named_parameters(recurse=False))
        settings = tuple(
            (key, value)
            for key, value in module.__dict__.items()
            if isinstance(value, bool | int | float | str | None)
            and key not in ("layer_idx", "layer_id")
        )
        found.append((name, type(module), shapes, settings))
    return tuple(found)


@contextlib.contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Causal masks are then made without a look at values, which meta tensors lack; others not."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    asked = config._attn_implementation  # type: ignore[union-attr]
    config._attn_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        config._attn_implementation = asked  # type: ignore[union-attr]


def _embedding(model: nn.Module) -> tuple[Linear | None, str | None]:
    table = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(table) is not nn.Embedding:
        return None, None
    names = {id(module): name for name, module in model.named_modules()}
    found = Linear(names[id(table)], table.embedding_dim, table.num_embeddings, bias=False)
    tied = head is not None and head.weight is table.weight
    return found, names[id(head)] if tied else None


def _group(
    model: nn.Module, blocks: Sequence[str], twins: Sequence[int], calls: Sequence[Call]
) -> Iterator[InputGroup]:
    seen: set[str] = set()
    for index, path in enumerate(blocks):
        members: dict[int, list[Linear]] = {}
        for block, inner, tensor in calls:
            name = f"{path}.{inner}"
            if block != twins[index] or name in seen:
                continue  # called twice: it belongs to the group of its first input
            seen.add(name)
            module = model.get_submodule(name)
            out_features, in_features = linear_shape(module)
            bias = getattr(module, "bias", None) is not None
            linear = Linear(name, out_features, in_features, bias, stack_of(model, name))
            members.setdefault(id(tensor), []).append(linear)
        for group in members.values():
            yield InputGroup(index, tuple(group))


def select(
    structure: Structure,
    targets: Sequence[str],
    ignore: Sequence[str],
    group: bool,
    only: Sequence[str] = ("re:",),
) -> list[InputGroup]:
    """Groups of the linears that the patterns choose; with ``group`` off, one linear a group.

    Patterns are full module paths or ``re:`` and a regular expression searched in the path;
    ``only`` are those that the method itself is for. Experts' linears are never grouped: no file
    format shares an A there. Linears of one output (gates) are left out: no rank of theirs saves
    anything. Raises InputError where nothing is left.
    """
    chosen: list[InputGroup] = []
    for found in structure.groups:
        members = [
            m
            for m in found.members
            if matches(m.name, targets)
            and matches(m.name, only)
            and not matches(m.name, ignore)
            and m.out_features > 1
        ]
        if not members:
            continue
        together = group and not any(member.stack for member in members)
        parts = [tuple(members)] if together else [(member,) for member in members]
        chosen += [InputGroup(found.block, part) for part in parts]
    if not chosen:
        raise InputError(
            "compress.targets, compress.ignore and the method leave no linear layer to compress"
        )
    return chosen


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns chooses the module path."""
    return any(
        re.search(p[3:], name) is not None if p.startswith("re:") else p == name for p in patterns
    )


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to its blocks for one batch.

    Attributes:
        hidden: input of the first block, (batch, tokens, width).
        calls: further positional and keyword arguments of each block.
    """

    hidden: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@contextlib.contextmanager
def _bypassed(model: nn.Module, structure: Structure, bypass: Any) -> Iterator[None]:
    """Replace every block's forward by ``bypass(index, hidden, args, kwargs) -> hidden``."""
    modules = [model.get_submodule(path) for path in structure.blocks]

    def make(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            out = bypass(index, hidden, args[1:], kwargs)
            return (out,) if structure.returns_tuple else out

        return forward

    for index, module in enumerate(modules):
        module.forward = make(index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _BlocksReached(Exception):  # noqa: N818 (control flow, not an error)
    """Raised once all blocks have been called, to skip the head."""


def record_inputs(model: nn.Module, structure: Structure, tokens: Tensor) -> BlockInputs:
    """Run the model with its blocks bypassed: embedding, masks and positions only, no head."""
    first: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            first.append(hidden)
        calls.append((args, kwargs))
        if index == len(structure.blocks) - 1:
            raise _BlocksReached
        return hidden

    with (
        _bypassed(model, structure, record),
        torch.no_grad(),
        contextlib.suppress(_BlocksReached),
    ):
        model(input_ids=tokens, use_cache=False)
    return BlockInputs(first[0], tuple(calls))


def run_block(
    block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> Tensor:
    """One block's output hidden states, (batch, tokens, width)."""
    args, kwargs = call
    output = block(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def tail_logits(model: nn.Module, structure: Structure, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits of the last block's output: final norm, head and whatever else follows the blocks.

    Args:
        tokens: (batch, tokens); hidden: output of the last block, (batch, tokens, width).
    """
    last = len(structure.blocks) - 1

    def put(index: int, passed: Tensor, args: Any, kwargs: Any) -> Tensor:
        return hidden if index == last else passed

    with _bypassed(model, structure, put):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def tail_gradients(
    model: nn.Module,
    structure: Structure,
    tokens: Tensor,
    hidden: Tensor,
    sampler: torch.Generator | None = None,
) -> list[Tensor]:
    """Gradients of the summed next-token loss with respect to the last block's output.

    Args:
        tokens: (batch, tokens); hidden: output of the last block, (batch, tokens, width).
        sampler: adds a second gradient, of the loss for next tokens drawn from the model's own
            prediction at each position instead of the text's.
    """
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = tail_logits(model, structure, tokens, leaf)
        labels = [tokens[:, 1:].flatten()]
        if sampler is not None:
            predicted = logits.detach()[:, :-1].flatten(0, 1).float().softmax(dim=-1)
            labels.append(torch.multinomial(predicted, 1, generator=sampler).flatten())
        return [
            torch.autograd.grad(_loss(logits, one), leaf, retain_graph=one is not labels[-1])[0]
            for one in labels
        ]


def tail_loss(model: nn.Module, structure: Structure, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Next-token loss summed over all positions, from the last block's output; see above."""
    return _loss(tail_logits(model, structure, tokens, hidden), tokens[:, 1:].flatten())


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    predicted = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(predicted, labels, reduction="sum")
