"""Sharing a parameter budget out over groups of linears."""

from __future__ import annotations

from svdexport.allocate import adacr, asvd, dobi_svd, greedy, lorc, svd_llm_v2, uniform
from svdexport.allocate.base import Allocation, Candidate, Strategy

STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy("the same kept share everywhere", uniform.allocate),
    "greedy": Strategy("one global pass over the predicted loss per parameter", greedy.allocate),
    "svd_llm_v2": Strategy(
        "SVD-LLM V2: by 1 / log of the truncation loss in each type of matrix",
        svd_llm_v2.allocate,
    ),
    "adacr": Strategy(
        "AdaSVD's adaCR: by the similarity of a block's input and output",
        adacr.allocate,
        frozenset({"similarity"}),
    ),
    "asvd": Strategy(
        "ASVD: one bound on the perplexity of every group truncated alone",
        asvd.allocate,
        measure="sensitivity",
    ),
    "dobi_svd": Strategy(
        "Dobi-SVD: truncation positions learned with the model's loss",
        dobi_svd.allocate,
        measure="positions",
    ),
    "lorc": Strategy(
        "LoRC: progressive over depth, by cumulative condition numbers", lorc.allocate
    ),
}

__all__ = ["STRATEGIES", "Allocation", "Candidate", "Strategy"]
