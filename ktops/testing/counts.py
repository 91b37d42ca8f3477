"""Counts the operators and allocations of a call, which are the same on every machine."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch


@dataclass
class Counts:
    """What PyTorch did in a ``with counted()`` block, on its thread and on that of autograd.

    Attributes:
        operators: the number of calls of each, including calls by other operators or from C++:
            {"aten::empty": 1}.
        allocations: the bytes of every allocated tensor, in order.
        peak: the largest number of bytes that these tensors occupied at once.
    """

    operators: Counter[str] = field(default_factory=Counter)
    allocations: list[int] = field(default_factory=list)
    peak: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what runs inside the ``with`` block; the result is complete when the block ends.

    Memory not allocated by PyTorch, such as NumPy's or a mapped file, is not counted.

    Example:
        >>> with counted() as counts:
        ...     torch.ones(4).neg()
        >>> counts.operators["aten::neg"], counts.allocations, counts.peak
        (1, [16, 16], 32)
    """
    counts = Counts()
    gc.collect()  # what earlier work left to be freed is not to be freed, and counted, in the block
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        yield counts
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    counts.operators.update(e.name() for e in events if "::" in e.name() and " " not in e.name())
    counts.allocations.extend(change for change in changes if change > 0)
    counts.peak = max(accumulate(changes, initial=0))
