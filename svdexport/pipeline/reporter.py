"""What a person sees while a run works: stages, progress, the time left and the time spent."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text


class Reporter:
    """Progress on stderr; silent with ``quiet``. Keeps the seconds of each stage.

    On a terminal the bar moves in place; elsewhere a line is written when a tenth is done.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.stages: list[tuple[str, float, bool]] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = 0.0
        self._tenth = -1

    @contextlib.contextmanager
    def stage(self, name: str, resumed: bool = False) -> Iterator[None]:
        """Announce a stage, show its progress, and note how long it took."""
        self.console.print(f"[bold]{name}[/bold]" + (" (done before)" if resumed else ""))
        self._began, self._tenth = time.perf_counter(), -1
        live = sys.stderr.isatty() and not self.quiet
        share = TextColumn("{task.percentage:>3.0f}%")
        columns = (TextColumn("  {task.description}"), BarColumn(24), share)
        if live:
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TimeLeft(), console=self.console, transient=True
            )
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
            self._bar = self._task = None
        self.stages.append((name, time.perf_counter() - self._began, resumed))

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` of a part of the current stage; ``what`` names it."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(what, total=total)
            self._bar.update(self._task, description=what, completed=done, total=total)
            return
        tenth = done * 10 // max(total, 1)
        if tenth != self._tenth and done:
            self._tenth = tenth
            spent = time.perf_counter() - self._began
            left = spent / done * (total - done)
            self.console.print(f"  {what}: {done}/{total}, {spent:.0f} s, {left:.0f} s left")

    def note(self, text: str) -> None:
        """A line of its own, under the stage; not broken in a log, where it may be searched for."""
        if self.console.is_terminal:
            self.console.print(Padding(Text(text), (0, 0, 0, 2)))
        else:
            self.console.print(f"  {text}", markup=False, soft_wrap=True)
