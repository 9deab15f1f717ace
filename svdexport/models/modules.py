"""The linear layer of a compressed model, and putting it in a model's place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svdexport.checkpoint import EmbeddingSpec, PairSpec, experts_apart
from svdexport.core.linears import is_linear, is_transposed
from svdexport.models.experts import separate_experts


class LowRankLinear(nn.Module):
    """y = B (A x) + bias. Members of a group use the leader's A.

    Only the leader registers ``lr_a``, so that a state dict holds a shared A once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        leader: LowRankLinear | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.lr_b = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if leader is None:
            self.lr_a = nn.Linear(in_features, rank, bias=False)
        self._leader = [self if leader is None else leader]  # in a list: not a submodule twice

    @property
    def first_factor(self) -> nn.Linear:
        return self._leader[0].lr_a

    @property
    def weight(self) -> Tensor:
        """B A, for code that only asks for a linear's dtype, device or values."""
        return self.lr_b.weight @ self.first_factor.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lr_b(self.first_factor(x))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear module of either orientation."""
    rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
    return (int(columns), int(rows)) if is_transposed(module) else (rows, columns)


def linear_weight(module: nn.Module) -> Tensor:
    """Weight as (out_features, in_features); of an embedding, (width, tokens)."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
    transposed = is_transposed(module) or isinstance(module, nn.Embedding)
    return weight.T if transposed else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear of either orientation a new weight (out_features, in_features)."""
    own = weight.T if is_transposed(module) else weight
    module.weight = nn.Parameter(own.contiguous(), requires_grad=False)


class LowRankEmbedding(nn.Module):
    """A token's row of the table is B A e, with e its one-hot vector: a column of A, then B."""

    def __init__(self, tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = tokens, width, rank
        self.lr_a = nn.Linear(tokens, rank, bias=False)
        self.lr_b = nn.Linear(rank, width, bias=False)

    @property
    def read(self) -> tuple[nn.Linear, ...]:
        """Modules whose weights the forward pass reads without calling them."""
        return (self.lr_a,)

    @property
    def weight(self) -> Tensor:
        """The table (tokens, width), for code that asks for its dtype, device or values."""
        return (self.lr_b.weight @ self.lr_a.weight).T

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.lr_b(nn.functional.embedding(ids, self.lr_a.weight.T))
        return rows


class LowRankHead(nn.Module):
    """A head that is tied to a low-rank embedding: logits = A^T (B^T x); no weights of its own."""

    def __init__(self, embedding: LowRankEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embedding = [embedding]  # in a list: not a submodule twice

    @property
    def read(self) -> tuple[nn.Linear, ...]:
        """Modules whose weights the forward pass reads without calling them."""
        return self._embedding[0].lr_a, self._embedding[0].lr_b

    @property
    def weight(self) -> Tensor:
        """The table (tokens, width)."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        table = self._embedding[0]
        logits: Tensor = (x @ table.lr_b.weight) @ table.lr_a.weight
        return logits


def replace_embedding(model: nn.Module, spec: EmbeddingSpec) -> None:
    """Put an (uninitialised) low-rank embedding, and a head that is tied to it, in place.

    Raises ValueError where the name is not a plain embedding of this model.
    """
    old = model.get_submodule(spec.name)
    if type(old) is not nn.Embedding:
        raise ValueError(f"the checkpoint compresses {spec.name}, which is not a plain embedding")
    with torch.device(old.weight.device):
        new = LowRankEmbedding(old.num_embeddings, old.embedding_dim, spec.rank)
    made: dict[str, nn.Module] = {spec.name: new.to(old.weight.dtype)}
    if spec.tied_head is not None:
        made[spec.tied_head] = LowRankHead(new)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def replace_linears(model: nn.Module, low_rank: Mapping[str, PairSpec]) -> None:
    """Put an (uninitialised) LowRankLinear in the place of each linear that ``low_rank`` names.

    Where experts are among them, all stacks of experts are taken apart. Raises ValueError where a
    name is not a linear of this model.
    """
    if experts_apart(low_rank):
        separate_experts(model)
    made: dict[str, LowRankLinear] = {}
    leaders_first = sorted(low_rank, key=lambda name: low_rank[name].group != name)
    for name in leaders_first:
        spec = low_rank[name]
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the checkpoint compresses {name}, which this model lacks") from None
        if not is_linear(old):
            raise ValueError(f"the checkpoint compresses {name}, which is not a linear layer")
        out_features, in_features = linear_shape(old)
        leader = None if spec.group == name else made[spec.group]
        has_bias = getattr(old, "bias", None) is not None
        weight: Tensor = old.weight  # type: ignore[assignment]
        with torch.device(weight.device):
            new = LowRankLinear(in_features, out_features, spec.rank, has_bias, leader)
        made[name] = new.to(weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[name])
