"""Lists of figures in a terminal, broken between figures and never inside of one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text

FIXED = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Items:
    """``head: one, two, three``; further lines are indented."""

    head: str
    items: tuple[str, ...]
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        joined = ", ".join(item.replace(" ", FIXED) for item in self.items)
        lines = textwrap.wrap(
            f"{self.head}: {joined}",
            options.max_width,
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        yield Text("\n".join(lines).replace(FIXED, " "), style=self.style)
