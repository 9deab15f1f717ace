"""The pictures of the docs, from a published folder: the report at two widths, and the terminal.

    python tools/pictures.py out/quickstart --to docs/images

Needs chromium for the report; the terminal's picture is an SVG by rich.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from svdexport.report import html, manifest
from svdexport.report.result import RunResult
from svdexport.report.table import summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"report-wide": (1100, 1500), "report-phone": (500, 1400)}  # chromium's least is 500


def terminal(result: RunResult, out: Path) -> None:
    """What a run prints at its end, on 80 columns."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=80, file=nowhere, force_terminal=True)
        console.print(f"$ {short(result.command)}", highlight=False, soft_wrap=False)
        console.print(summary(result))
    text = console.export_svg(title="svdexport", font_aspect_ratio=0.61, unique_id="svdexport")
    # the font would come from the network; any monospaced one does
    text = re.sub(r"@font-face \{.*?\}", "", text, flags=re.DOTALL)
    out.write_text(text.replace("Fira Code, monospace", "monospace"))


def short(command: str) -> str:
    """A command without the folders of whoever ran it."""
    return re.sub(r"/\S*/(?=[^/\s]+)", "", command)


def report(page: Path, out: Path, size: tuple[int, int]) -> None:
    """A screenshot of the page's upper part."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
                f"--screenshot={out}", page.resolve().as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    result, _ = manifest.read(given.folder)
    given.to.mkdir(parents=True, exist_ok=True)
    terminal(result, given.to / "terminal.svg")
    with tempfile.TemporaryDirectory() as scratch:
        page = html.write(result, Path(scratch))
        for name, size in WIDTHS.items():
            report(page, (given.to / f"{name}.png").resolve(), size)


if __name__ == "__main__":
    main()
