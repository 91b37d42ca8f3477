"""Times the operators step by step."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Step:
    """The time of one step of an operator, summed over its calls.

    Attributes:
        op: "moe_fwd", "moe_sft_fwd" or "moe_sft_bwd".
        name: "arguments" (checks, results), "prepare" (routing, workspace), a phase of the parallel region,
            "launch" (start and end of its threads), "finish".
        calls, tasks: the number of times it ran, and the number of tasks in total.
        busy: seconds spent in tasks, summed over threads.
        wait: seconds spent waiting for the last tasks of other threads, summed over threads.
        wall: elapsed seconds. Every moment of a call belongs to exactly one step.
        paths: how products with the base weights were computed, as {path: number of blocks}. The paths are
            those of ktops_csrc/gemm/path.h. Empty for other steps.
        at_home, stolen: of the tasks whose weights are on one NUMA node after :func:`ktops.numa_placement`,
            those that a thread on this node ran, and those that a thread on another node ran.
    """

    op: str
    name: str
    calls: int
    tasks: int
    busy: float
    wait: float
    wall: float
    paths: dict[str, int] = field(default_factory=dict)
    at_home: int = 0
    stolen: int = 0

    @property
    def taken(self) -> str:
        """``paths`` as text: "dots 12, panels 4"."""
        return ", ".join(f"{path} {blocks}" for path, blocks in self.paths.items())


@dataclass
class Profile:
    """The steps that ran, in order of first appearance; filled at the end of the ``with`` block."""

    steps: list[Step] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """Seconds spent in tasks, summed over threads."""
        return sum(step.busy for step in self.steps)

    @property
    def at_home(self) -> float | None:
        """The share of tasks with a NUMA node that ran there; None without such tasks."""
        at_home, stolen = (sum(getattr(step, name) for step in self.steps) for name in ("at_home", "stolen"))
        return at_home / (at_home + stolen) if at_home + stolen else None

    def __str__(self) -> str:
        has_homes = self.at_home is not None
        head = f"{'operator':12} {'step':18} {'calls':>6} {'tasks':>8} {'busy ms':>10} {'share':>6}"
        homes = f" {'at home':>8} {'stolen':>8}" if has_homes else ""
        lines = [f"{head} {'wait ms':>10} {'wall ms':>10}{homes}  blocks by path"]
        for step in self.steps:
            line = (
                f"{step.op:12} {step.name:18} {step.calls:6} {step.tasks:8} {step.busy * 1e3:10.3f} "
                f"{step.busy / (self.busy or 1):6.1%} {step.wait * 1e3:10.3f} {step.wall * 1e3:10.3f}"
            )
            homes = f" {step.at_home:8} {step.stolen:8}" if has_homes else ""
            lines.append(f"{line}{homes}  {step.taken}".rstrip())
        return "\n".join(lines)


Recorded = dict[tuple[str, str], Counter]
"""Maps (operator, step) to the numbers of its Step and of its paths, by name."""

NUMBERS = ("calls", "tasks", "busy", "wait", "wall", "at_home", "stolen")


def _recorded() -> Recorded:
    steps = {}
    for line in torch.ops.kt.profiled_steps().splitlines():
        op, name, *values = line.split()
        paths = dict(path.split("=") for path in values[len(NUMBERS) :])
        numbers = dict(zip(NUMBERS, values, strict=False)) | paths
        steps[op, name] = Counter({key: int(value) for key, value in numbers.items()})
    return steps


def _since(before: Recorded) -> list[Step]:
    steps = []
    for (op, name), values in _recorded().items():
        since = values - before.get((op, name), Counter())
        calls, tasks, busy, wait, wall, *homes = (since.pop(number, 0) for number in NUMBERS)
        if calls:
            seconds = (busy / 1e9, wait / 1e9, wall / 1e9)
            steps.append(Step(op, name, calls, tasks, *seconds, dict(since), *homes))
    return steps


@contextmanager
def profile() -> Iterator[Profile]:
    """Records the time of each step of the operators in the ``with`` block, in all threads of the process.

    Each step costs every thread three clock readings while profiling is on, and one comparison while it is
    off. ``KTOPS_PROFILE=1`` records from the start and prints the table to stderr when Python exits. In
    torch.profiler, the operators appear as kt::moe_sft_fwd and so on, without their steps.

    Example:
        >>> with ktops.profile() as p:
        ...     ktops.moe_sft(x, ids, w, gate_up_proj, down_proj).sum().backward()
        >>> print(p)
    """
    result, before = Profile(), _recorded()
    previous = torch.ops.kt.set_profiling(True)
    try:
        yield result
    finally:
        torch.ops.kt.set_profiling(previous)
        result.steps = _since(before)


def print_at_exit() -> None:
    """Prints everything recorded to stderr when Python exits."""
    import atexit
    import sys

    atexit.register(lambda: print(Profile(_since({})), file=sys.stderr))


if torch.ops.kt.profiling():
    print_at_exit()
