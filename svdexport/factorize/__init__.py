"""Factorisation methods. A method is one file here and one line in METHODS."""

from __future__ import annotations

from svdexport.factorize import kfac_svd, svd, svd_llm
from svdexport.factorize.base import GroupData, Method, split_outputs

METHODS: dict[str, Method] = {
    method.name: method for method in (svd.METHOD, svd_llm.METHOD, kfac_svd.METHOD)
}

__all__ = ["METHODS", "GroupData", "Method", "split_outputs"]
