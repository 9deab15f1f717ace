"""LoRC: low rank of the key and value projections alone, so that the KV cache can shrink."""

from __future__ import annotations

from svdexport.factorize import svd
from svdexport.factorize.base import Method

# The names by which nearly all decoders call them; one fused matrix for q, k and v has no K and V
# of its own to factorise.
KEY_AND_VALUE = ("re:(^|[._])(k|v|key|value)(_proj)?$",)

METHOD = Method(
    "lorc",
    "LoRC (K and V projections; with allocate: lorc, progressive over depth)",
    "Zhang et al., 2024, arXiv 2410.03111",
    frozenset(),
    svd.factorize,
    only=KEY_AND_VALUE,
)
