"""What rounding the embedding and the head alone costs, by type: to nearest and by GPTQ.

    python tools/benchmarks/vocabulary.py MODEL --calibration FILE --evaluation FILE [--types Q4_0]

The divergence a token from the dense model, and the perplexity, of the model with that one matrix
rounded (both where they are not tied) and all else as it is, in torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdexport.models.loader import load_model, load_tokenizer
from svdexport.pipeline.vocabulary import head_inputs, rounded, vocabulary
from svdexport.recipe import Quantize


def samples(tokenizer: Any, path: Path, count: int, length: int) -> Tensor:
    text = path.read_text(encoding="utf-8")[: 10 * count * length]
    tokens = torch.tensor(tokenizer(text).input_ids)
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def log_probs(network: Any, tokens: Tensor) -> list[Tensor]:
    return [network(input_ids=row[None]).logits[0].log_softmax(dim=-1) for row in tokens]


def score(dense: list[Tensor], found: list[Tensor], tokens: Tensor) -> tuple[float, float]:
    """(mean divergence, perplexity)."""
    pairs = zip(dense, found, strict=True)
    divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / tokens.numel()
    scored = zip(found, tokens, strict=True)
    losses = [-q[:-1].gather(1, row[1:, None]).mean() for q, row in scored]
    return divergence, float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q5_0", "Q4_0", "IQ4_NL"])
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    network: Any = load_model(options.model).eval().requires_grad_(False)
    tokenizer = load_tokenizer(options.model)
    inputs = head_inputs(network, samples(tokenizer, options.calibration, 16, options.length))
    tokens = samples(tokenizer, options.evaluation, options.windows, options.length)
    dense = log_probs(network, tokens)
    print(f"dense: perplexity {score(dense, dense, tokens)[1]:.3f}", flush=True)
    for kind in options.types:
        for settings in (Quantize(algorithm="rtn"), Quantize()):
            weights = {name: network.get_submodule(name).weight for name in vocabulary(network)}
            kept = {name: weight.data.clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.data.copy_(rounded(network, name, kind, settings, inputs).values)
            divergence, perplexity = score(dense, log_probs(network, tokens), tokens)
            for name, weight in weights.items():
                weight.data.copy_(kept[name])
            print(
                f"{kind:7} {settings.algorithm:4} divergence {divergence:.4f}, "
                f"perplexity {perplexity:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
