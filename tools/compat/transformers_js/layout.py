"""Give an ONNX folder the layout that transformers.js and its pages expect: onnx/model.onnx.

python layout.py FOLDER OUT [NAME]    NAME of the graph in OUT/onnx, for example model_q4.onnx
"""

from __future__ import annotations

import filecmp
import shutil
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    name = sys.argv[3] if len(sys.argv) > 3 else "model.onnx"
    data, there = folder / "model.onnx.data", out / "onnx" / "model.onnx.data"
    if not data.is_file():
        sys.exit(f"{data}: no such file; give a folder that svdexport wrote")
    if there.exists() and not filecmp.cmp(data, there, shallow=False):
        sys.exit(f"{there}: holds another graph's weights; give another OUT")
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(file, out / file.name)
    # The graph names its data file: that name stays.
    shutil.copyfile(folder / "model.onnx", out / "onnx" / name)
    shutil.copyfile(data, there)


if __name__ == "__main__":
    main()
