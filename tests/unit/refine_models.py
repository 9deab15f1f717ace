"""A tiny random decoder and its truncation, as refiners get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdexport.checkpoint import PairSpec
from svdexport.core.moments import Statistic
from svdexport.models.blocks import Structure, discover
from svdexport.models.calibrate import BlockMoments, calibrate
from svdexport.models.decoder import Decoder
from svdexport.models.modules import linear_weight, replace_linears
from svdexport.refine import RefineData


def dense_model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def truncated(rank: int, structure: Structure, dense_blocks: tuple[int, ...] = ()) -> Any:
    """The model with every group as a pair by a plain SVD; given blocks stay dense."""
    model = dense_model()
    groups = [group for group in structure.groups if group.block not in dense_blocks]
    weights = {
        m.name: linear_weight(model.get_submodule(m.name)) for g in groups for m in g.members
    }
    replace_linears(model, {m.name: PairSpec(rank, g.leader) for g in groups for m in g.members})
    for group in groups:
        stacked = torch.cat([weights[m.name] for m in group.members]).double()
        u, s, vt = torch.linalg.svd(stacked, full_matrices=False)
        model.get_submodule(group.leader).lr_a.weight.data = vt[:rank].float().contiguous()
        parts = (u[:, :rank] * s[:rank]).float().split([m.out_features for m in group.members])
        for member, part in zip(group.members, parts, strict=True):
            model.get_submodule(member.name).lr_b.weight.data = part.contiguous()
    return model.eval().requires_grad_(False)


def data(
    scratch: Path,
    *,
    rank: int = 6,
    windows: int = 24,
    length: int = 16,
    gradients: bool = False,
    dense_blocks: tuple[int, ...] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RefineData:
    teacher = dense_model()
    structure = discover(teacher)
    student = Decoder(truncated(rank, structure, dense_blocks), structure)
    tokens = torch.randint(0, 50, (windows, length), generator=torch.Generator().manual_seed(1))
    groups = {
        group.leader: [m.name for m in group.members]
        for group in structure.groups
        if group.block not in dense_blocks
    }
    scratch.mkdir(parents=True, exist_ok=True)

    def moments() -> Iterator[BlockMoments]:
        asked: tuple[Statistic, ...] = ("gradients",) if gradients else ()
        return calibrate(teacher, structure, tokens, batch=8, statistics=asked, scratch=scratch)

    return RefineData(
        student,
        lambda: Decoder(teacher, structure),
        moments,
        groups,
        tokens,
        scratch,
        progress,
    )
