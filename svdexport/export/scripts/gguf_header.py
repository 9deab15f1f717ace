"""Run llama.cpp's converter for the header of its file: no weight is read, the data is a hole.

    python gguf_header.py .../convert_hf_to_gguf.py FOLDER --outtype f16 --outfile OUT

A program of its own, as the converter is one: it shares no module with svdexport.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def write_hole(writer: Any, *, progress: bool = False) -> None:
    """In place of ``GGUFWriter.write_tensors_to_file``: the tensors' entries, then nothing."""
    writer.write_ti_data_to_file()
    for out, tensors in zip(writer.fout, writer.tensors, strict=True):
        writer.write_padding(out, out.tell())
        sizes = [writer.ggml_pad(info.nbytes, writer.data_alignment) for info in tensors.values()]
        out.truncate(out.tell() + sum(sizes))


def main() -> None:
    """Patch gguf-py, then run the converter."""
    converter = Path(sys.argv[1])
    sys.path[0] = str(converter.parent)  # as if the converter itself had been started
    if (converter.parent / "gguf-py").is_dir():
        sys.path.insert(1, str(converter.parent / "gguf-py"))
    import gguf

    gguf.GGUFWriter.write_tensors_to_file = write_hole
    sys.argv = sys.argv[1:]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main()
