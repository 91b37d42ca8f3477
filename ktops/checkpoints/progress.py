"""How reading and writing goes: a bar in a terminal, a line now and then elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ktops.checkpoints.experts import Step, no_step

SECONDS = 10
"""Between two lines where there is no terminal."""


@contextmanager
def progress(description: str, total: int, *, show: bool = True) -> Iterator[Step]:
    """Shows how much of ``total`` is done; yields the function that is told of every step.

    Example:
        >>> with progress("experts", len(layers)) as step:
        ...     for layer in layers:
        ...         layer.read()
        ...         step(1)
    """
    if not show:
        yield no_step
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(description, total) as step:
            yield step
    else:
        yield _Lines(description, total)


@contextmanager
def _bar(description: str, total: int) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn(f"  {description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """A line on stderr every ten seconds."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.done, self.last = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            print(f"  {self.description} {self.done / max(1, self.total):4.0%}", file=sys.stderr, flush=True)
