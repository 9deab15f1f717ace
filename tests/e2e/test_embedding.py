"""The low-rank token embedding: its directions, its checkpoint, its tied head."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdexport import api
from svdexport.checkpoint import Checkpoint
from svdexport.core.lowrank import FactorPair
from svdexport.errors import InputError, RecipeError
from svdexport.factorize import METHODS, GroupData
from svdexport.models.loader import load_model
from svdexport.models.weights import StreamedWeights
from svdexport.recipe.settings import EmbAe
from svdexport.safety.model_folder import check_model_folder
from tests.e2e.test_methods import RECIPE
from tests.unit.gguf_models import WORDS, make_model

OVERRIDES = ("compress.method=emb_ae", "compress.rank_multiple=8")


def cosines(table: Tensor, approximate: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(table, approximate, dim=1).sum())


def solved(table: Tensor, rank: int, iterations: int) -> Tensor:
    """The approximate table, (tokens, width)."""
    method = METHODS["emb_ae"]
    settings = EmbAe(iterations=iterations)
    given = GroupData((table.T,), None, None, rank, 0.1, settings)
    assert method.keep is not None
    assert method.finish is not None
    start = method.factorize(given).pair(rank)
    return method.finish(start, method.keep(given), settings).dense().T


def test_directions_are_kept_better_than_by_the_svd_and_near_the_best_found_by_descent() -> None:
    torch.manual_seed(0)
    lengths = torch.logspace(-1, 1, 90)  # long rows draw the SVD to themselves
    table = torch.randn(90, 12) @ torch.diag(torch.logspace(0, -1, 12)) * lengths[:, None]
    sums = [cosines(table, solved(table, 4, steps)) for steps in (0, 1, 5, 40)]
    assert sums == sorted(sums)
    assert sums[-1] > sums[0] * 1.01
    encoder = torch.randn(12, 4, requires_grad=True)
    optimizer = torch.optim.Adam([encoder], lr=0.02)
    for _ in range(800):  # a linear autoencoder with orthonormal weights, on the summed cosines
        basis = torch.linalg.qr(encoder)[0]
        loss = -torch.nn.functional.cosine_similarity(table, table @ basis @ basis.T, dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sums[-1] > -float(loss.detach()) * 0.999


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("tokens", [90, 9])
def test_scales_of_the_start_do_not_matter(iterations: int, tokens: int) -> None:
    table = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(0))
    u, _, _ = torch.linalg.svd(table.T)
    settings, finish = EmbAe(iterations=iterations), METHODS["emb_ae"].finish
    assert finish is not None
    scaled = FactorPair(torch.zeros(4, tokens), u[:, :4] * torch.logspace(-2, 2, 4))
    found = finish(scaled, {"weight": table.T}, settings).dense().T
    assert torch.allclose(found, solved(table, 4, iterations), atol=1e-4)
    if iterations == 0:  # the projection on the SVD's directions
        assert torch.allclose(found, table @ u[:, :4] @ u[:, :4].T, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_no_step_lowers_the_summed_cosines(seed: int) -> None:
    """Few dimensions of many: the rows that are left out would weigh most in an eigenproblem."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(200, 32, generator=generator) @ torch.diag(torch.logspace(0, -1, 32))
    sums = [cosines(table, solved(table, 2, steps)) for steps in range(8)]
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(sums))
    assert sums[-1] > 1.005 * sums[0]
    # the maximum of a function that lies below the sum and meets it at the start: by the SVD
    start = torch.linalg.svd(table.double().T)[0][:, :2]
    units = table.double() / table.double().norm(dim=1, keepdim=True)
    slope = sum(torch.outer(u, u @ start) / (u @ start).norm() for u in units)
    left, _, right = torch.linalg.svd(slope, full_matrices=False)
    basis = left @ right
    assert torch.allclose(solved(table, 2, 1).double(), table.double() @ basis @ basis.T, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_loads_and_a_tied_head_uses_the_same_factors(
    tmp_path: Path, tied: bool
) -> None:
    make_model(
        tmp_path / "model", "Llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=tied
    )
    (tmp_path / "text.txt").write_text(WORDS * 60)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folder = api.compress(tmp_path / "recipe.yaml", tmp_path / "out", OVERRIDES)
    check_model_folder(folder)
    found = Checkpoint.open(folder)
    a, b = (found.tensor(f"model.embed_tokens.lr_{x}.weight") for x in "ab")
    assert not found.has("model.embed_tokens.weight")
    assert found.has("lm_head.weight") != tied
    assert a.numel() + b.numel() <= 0.65 * 384 * 64
    expected = load_model(tmp_path / "model")
    with torch.no_grad():
        expected.get_input_embeddings().weight.copy_((b @ a).T)  # a tied head's as well
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = load_model(folder)(tokens).logits
        assert torch.allclose(logits, expected(tokens).logits, atol=1e-4)
        for weights in (StreamedWeights(folder, ()).on_call(), StreamedWeights(folder, ()).ends()):
            with weights as model:
                assert torch.equal(model(tokens).logits, logits)
            assert all(parameter.is_meta for parameter in model.parameters())
    (entry,) = api.plan(tmp_path / "recipe.yaml", OVERRIDES)["exports"]
    assert entry["weight_bytes"] == sum(tensor.nbytes for _, tensor in found.iter_tensors())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["embedding"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rank 3"):
        check_model_folder(folder)


@pytest.mark.parametrize("stream", ["auto", "always"])
def test_a_whole_run_exports_a_checkpoint_and_other_formats_are_refused(
    tmp_path: Path, stream: str
) -> None:
    make_model(tmp_path / "model", "Llama", tie_word_embeddings=True)
    (tmp_path / "text.txt").write_text(WORDS * 60)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    outcome = api.run(recipe, tmp_path / "out", (*OVERRIDES, f"compress.stream={stream}"))
    assert outcome.out is not None
    assert [row.name for row in outcome.result.plan] == ["model.embed_tokens"]
    kept = next(a for a in outcome.result.artifacts if a.kept)
    assert kept.quality is not None
    assert kept.parity is not None
    assert kept.parity.problems == ()
    with pytest.raises(RecipeError, match=r"emb_ae .* export format: checkpoint"):
        api.run(recipe, tmp_path / "no", (*OVERRIDES, "export.0.format=gguf"))
