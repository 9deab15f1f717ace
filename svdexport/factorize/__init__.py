"""Factorisation methods. A method is one file here and one line in METHODS."""

from __future__ import annotations

from svdexport.factorize import (
    adasvd,
    asvd,
    basis_sharing,
    dobi_svd,
    emb_ae,
    fwsvd,
    kfac_svd,
    lorc,
    svd,
    svd_llm,
    svd_llm_v2,
    tfwsvd,
)
from svdexport.factorize.base import GroupData, Method, split_outputs

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (
        svd,
        fwsvd,
        tfwsvd,
        asvd,
        svd_llm,
        svd_llm_v2,
        adasvd,
        dobi_svd,
        basis_sharing,
        lorc,
        emb_ae,
        kfac_svd,
    )
}

__all__ = ["METHODS", "GroupData", "Method", "split_outputs"]
