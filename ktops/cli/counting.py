"""Shows how work goes that is no training: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0
"""Least time between lines."""


@contextmanager
def counting(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, total) as work goes on."""
    columns = (TextColumn(f"  {description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def update(done: int, total: int) -> None:
            nonlocal last
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                last = time.monotonic()
                console.print(f"  {description} {done}/{total}")

        yield update
