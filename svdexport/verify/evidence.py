"""What a published folder keeps so that its parity can be repeated anywhere, without the model.

``checks/<artifact>.safetensors`` holds the tokens of the parity check and torch's logits for the
values read back from the file: all positions, and of the vocabulary the likely tokens and a fixed
random part, which is enough to repeat the comparison within a few percent and stays at megabytes.
The tensors' hashes say that the file still holds those values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svdexport.core.measures import Parity
from svdexport.errors import ArtifactError
from svdexport.safety import check_safetensors
from svdexport.verify.parity import Tolerance, compare

FOLDER = "checks"
EVALUATION = "evaluation.safetensors"  # the windows of tokens that quality was measured on
TOP_TOKENS = 8  # of each position
RANDOM_TOKENS = 2048  # of the vocabulary, the same for every file

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Evidence:
    """Tokens (T,), columns (C,) of the vocabulary, and torch's logits (T, C) in these columns.

    `rounded` are the logits with activations rounded to 8 bits, where the runtime rounds them.
    """

    tokens: NDArray[np.int64]
    columns: NDArray[np.int64]
    logits: Logits
    rounded: Logits | None = None


def of(tokens: NDArray[np.int64], logits: Logits, rounded: Logits | None) -> Evidence:
    """The part of a parity check that is kept; logits (T, V)."""
    vocab = logits.shape[1]
    random = np.random.default_rng(0).permutation(vocab)[:RANDOM_TOKENS]
    top = np.argpartition(logits, -min(TOP_TOKENS, vocab), axis=1)[:, -TOP_TOKENS:]
    columns = np.union1d(random, top.ravel()).astype(np.int64)
    part = None if rounded is None else rounded[:, columns]
    return Evidence(tokens.astype(np.int64), columns, logits[:, columns], part)


def path_of(folder: Path, artifact: str) -> Path:
    """Where a published folder keeps the evidence of an artifact."""
    return folder / FOLDER / f"{artifact}.safetensors"


def write(evidence: Evidence, path: Path) -> None:
    """Write the evidence of one artifact."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"tokens": evidence.tokens, "columns": evidence.columns, "logits": evidence.logits}
    if evidence.rounded is not None:
        arrays["rounded"] = evidence.rounded
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def read(path: Path) -> Evidence:
    """The inverse of ``write``. Raises ArtifactError where the file is not there or is not one."""
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ArtifactError(f"{path}: missing, so that parity cannot be repeated; run again")
    check_safetensors(path)
    arrays = load_file(path)
    try:
        tokens, columns, logits = arrays["tokens"], arrays["columns"], arrays["logits"]
    except KeyError as error:
        raise ArtifactError(f"{path}: holds no {error}: not the evidence of a run") from None
    if logits.shape != (tokens.size, columns.size) or not tokens.size or not columns.size:
        raise ArtifactError(f"{path}: logits of shape {logits.shape}, not of tokens and columns")
    for name, ids in (("tokens", tokens), ("columns", columns)):
        if ids.dtype != np.int64 or int(ids.min()) < 0:
            raise ArtifactError(f"{path}: {name} are not token ids")
    return Evidence(tokens, columns, logits, arrays.get("rounded"))


def repeat(evidence: Evidence, logits: Logits, limits: Tolerance, exact: bool = False) -> Parity:
    """Parity of a runtime's logits (T, V) with the evidence. Raises ArtifactError where the
    vocabulary is smaller than the evidence's."""
    if logits.shape[1] <= int(evidence.columns.max()):
        raise ArtifactError(f"logits for {logits.shape[1]} tokens; the evidence has more")
    return compare(evidence.logits, logits[:, evidence.columns], limits, evidence.rounded, exact)
