"""Shows the progress of long operations, and formats memory sizes."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[int], None]
"""Called with the number of items completed since the last call."""

SECONDS = 10
"""Seconds between progress lines when no bar is shown."""


def no_step(count: int) -> None:
    pass


@contextmanager
def progress(description: str, total: int, *, show: bool = True) -> Iterator[Step]:
    """Shows progress toward ``total`` items, as a bar in a terminal if rich is installed, otherwise as lines.

    Yields a function to call with the number of newly completed items.

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
    """Prints a line to stderr every ten seconds."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.done, self.last = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            print(f"  {self.description} {self.done / max(1, self.total):4.0%}", file=sys.stderr, flush=True)


def format_bytes(count: float) -> str:
    """Formats a number of bytes in KiB, MiB or GiB.

    Example:
        >>> format_bytes(12_900_000)
        '12.3 MiB'
    """
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
