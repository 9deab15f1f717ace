"""Learned truncation positions (Dobi-SVD): where to cut the singular values of outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdexport.core.lowrank import break_even_rank, pair_params
from svdexport.core.remap import slots_per_rank
from svdexport.core.soft_truncation import soft_truncate
from svdexport.models.blocks import InputGroup
from svdexport.models.calibrate import Progress
from svdexport.models.modules import linear_weight
from svdexport.recipe.settings import DobiPositions


def learn_positions(
    model: nn.Module,
    groups: Sequence[InputGroup],
    tokens: Tensor,
    param_ratio: float,
    settings: DobiPositions,
    progress: Progress = lambda what, done, total: None,
    *,
    remapped: bool = False,
) -> dict[str, float]:
    """The rank k of each group that a gradient descent on the model's own loss finds.

    Loss: perplexity + ratio_weight * |kept - param_ratio| + range_weight * the squared share by
    which positions leave [1, break-even], one sample a step. The weights stay as they are: every
    group's outputs W x are truncated softly in the forward pass. A sample must have more tokens
    than the ranks in question, or nothing is cut. With ``remapped`` a rank counts max(m, n)
    parameters, and break-even is the full rank.

    Returns: positions by leader, within [1, break-even].
    """
    shapes = {g.leader: _shape(g) for g in groups}
    ends = min if remapped else break_even_rank
    limits = torch.tensor([max(1, ends(*shapes[g.leader])) for g in groups]).double()
    each = slots_per_rank if remapped else partial(pair_params, 1)
    unit = torch.tensor([each(*shapes[g.leader]) for g in groups]).double()
    dense = torch.tensor([m * n for m, n in shapes.values()]).double()
    start = torch.minimum(limits, param_ratio * dense / unit)
    positions = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([positions], lr=settings.rate)
    for step in range(settings.iterations):
        sample = tokens[step % len(tokens)][None]
        with _truncating(model, groups, positions, settings.beta), torch.enable_grad():
            logits = model(input_ids=sample, use_cache=False).logits[0, :-1].float()
            loss = torch.exp(nn.functional.cross_entropy(logits, sample[0, 1:]).double())
        kept = (torch.minimum(positions, limits) * unit).sum() / dense.sum()
        outside = torch.relu(1.0 - positions) + torch.relu(positions - limits)
        penalty = settings.ratio_weight * (kept - param_ratio).abs()
        penalty = penalty + settings.range_weight * (outside / limits).square().sum()
        optimizer.zero_grad()
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress("positions", step + 1, settings.iterations)
    found = torch.minimum(positions.detach().clamp_min(1.0), limits)
    return {group.leader: float(value) for group, value in zip(groups, found, strict=True)}


def _shape(group: InputGroup) -> tuple[int, int]:
    return sum(m.out_features for m in group.members), group.members[0].in_features


@contextlib.contextmanager
def _truncating(
    model: nn.Module, groups: Sequence[InputGroup], positions: Tensor, beta: float
) -> Iterator[None]:
    """Outputs of every group are truncated at its position while the context lasts."""
    with contextlib.ExitStack() as stack:
        for group, position in zip(groups, positions, strict=True):
            _hook(stack, model, group, position, beta)
        yield


def _hook(
    stack: contextlib.ExitStack, model: nn.Module, group: InputGroup, position: Tensor, beta: float
) -> None:
    """The group's outputs, without biases, are one matrix: the members share its directions."""
    modules = {member.name: model.get_submodule(member.name) for member in group.members}
    weights = [linear_weight(module) for module in modules.values()]
    parts: dict[str, Tensor] = {}

    def truncate(_m: nn.Module, args: Any) -> None:
        x = args[0]
        y = torch.cat([x @ weight.T for weight in weights], dim=-1)
        cut = soft_truncate(y.flatten(0, -2), position, beta).reshape(y.shape)
        sizes = [weight.shape[0] for weight in weights]
        parts.update(zip(modules, torch.split(cut, sizes, dim=-1), strict=True))

    leader = modules[group.leader]
    stack.callback(leader.register_forward_pre_hook(truncate).remove)
    for name, module in modules.items():

        def put(module: nn.Module, _a: Any, _out: Tensor, name: str = name) -> Tensor:
            part = parts.pop(name)
            bias = module.bias
            return part if bias is None else part + bias  # type: ignore[operator]

        stack.callback(module.register_forward_hook(put).remove)
