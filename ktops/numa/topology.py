"""The NUMA nodes of this machine, as far as this process may use them."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SYSTEM = Path("/sys/devices/system")
STATUS = Path("/proc/self/status")
VARIABLE = "KTOPS_NUMA_NODES"


@dataclass(frozen=True)
class Node:
    """A NUMA node with CPUs that this process may use.

    Attributes:
        id: the number of the node, as in ``numactl --hardware``.
        cores: the CPUs that this process may use, grouped by physical core.
        memory_bytes: the size of its memory; 0 if this process may not use it.
        pretended: whether ``KTOPS_NUMA_NODES`` made it up.
    """

    id: int
    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int
    pretended: bool = False

    @property
    def cpus(self) -> tuple[int, ...]:
        """The CPUs that this process may use, in order."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))


def nodes() -> tuple[Node, ...]:
    """Returns the NUMA nodes on whose CPUs this process may run, in the order of their numbers.

    Affinity (``taskset``, ``numactl``, torchrun's ``--numa-binding``), cpusets and containers limit the CPUs;
    nodes without a usable CPU, such as those of memory alone, are left out. A system that does not report
    nodes has one. ``KTOPS_NUMA_NODES=2`` pretends that the usable CPUs are two nodes, each a half of them in
    order, to try what depends on nodes on a machine with one.

    Raises:
        ValueError: ``KTOPS_NUMA_NODES`` is not a number from 1 to that of the usable cores.

    Example:
        >>> [len(node.cpus) for node in ktops.numa.nodes()]
        [48, 48]
    """
    pretended = os.environ.get(VARIABLE)
    found = read_nodes(SYSTEM, usable_cpus(), usable_memory(STATUS))
    return found if not pretended else pretend(found, pretended)


def usable_cpus() -> set[int]:
    """Returns the CPUs on which any thread of this process may run.

    Threads that OpenMP binds (``OMP_PROC_BIND``), the first one included, have one CPU each.
    """
    own = os.sched_getaffinity(0)
    if len(own) == 1 and torch.get_num_threads() > 1:
        torch.zeros(torch.get_num_threads() << 16)  # starts the threads
    return own.union(*(affinity(thread) for thread in threads()))


def threads() -> list[int]:
    """Returns the ids of this process's threads."""
    return [int(name) for name in os.listdir("/proc/self/task")]


def affinity(thread: int) -> set[int]:
    """Returns the CPUs on which a thread may run; none if it has ended."""
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return set()


def set_affinity(cpus: Collection[int]) -> None:
    """Makes all threads of this process, and those that they start, run on some CPUs only."""
    for thread in threads():
        try:
            os.sched_setaffinity(thread, cpus)
        except ProcessLookupError:  # it has ended
            continue


def usable_memory(status: Path) -> set[int] | None:
    """Returns the nodes whose memory this process may use; None if the system does not say."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    allowed = [line.split(":")[1] for line in lines if line.startswith("Mems_allowed_list:")]
    return set(parse_list(allowed[0])) if allowed else None


def read_nodes(system: Path, usable: Collection[int], memory: Collection[int] | None) -> tuple[Node, ...]:
    """Returns the nodes below ``system``, a directory like /sys/devices/system.

    Args:
        usable: the CPUs that may be used.
        memory: the nodes whose memory may be used; None: all.
    """
    found = []
    folders = [path for path in (system / "node").glob("node*") if path.name[4:].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name[4:])):
        cpus = [cpu for cpu in parse_list(read(folder / "cpulist")) if cpu in usable]
        if cpus:
            number = int(folder.name[4:])
            size = memory_bytes(folder) if memory is None or number in memory else 0
            found.append(Node(number, by_core(system, cpus), size))
    return tuple(found) or (Node(0, by_core(system, sorted(usable)), 0),)


def by_core(system: Path, cpus: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups CPUs by physical core; CPUs of which the system does not say it are cores of their own."""
    cores: dict[int, list[int]] = {}
    for cpu in cpus:
        cores.setdefault(core_of(system, cpu), []).append(cpu)
    return tuple(tuple(core) for core in cores.values())


def core_of(system: Path, cpu: int) -> int:
    """Returns the first CPU of the physical core of a CPU, whether or not this process may use it."""
    siblings = parse_list(read(system / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"))
    return min(siblings, default=cpu)


def pretend(found: Sequence[Node], count: str) -> tuple[Node, ...]:
    """Returns the CPUs of some nodes as ``count`` nodes of nearly the same number of cores, in order."""
    cores = [core for node in found for core in node.cores]
    number = int(count) if count.isdecimal() else 0
    if not 1 <= number <= len(cores):
        raise ValueError(
            f"{VARIABLE} must be a number of nodes from 1 to {len(cores)}, the cores that this process may "
            f"use, got {count!r}"
        )
    bounds = [index * len(cores) // number for index in range(number + 1)]
    size = sum(node.memory_bytes for node in found) // number
    return tuple(
        Node(index, tuple(cores[bounds[index] : bounds[index + 1]]), size, pretended=True)
        for index in range(number)
    )


def memory_bytes(folder: Path) -> int:
    """Returns the size of a node's memory, 0 if the system does not report it."""
    sizes = [line.split()[-2] for line in read(folder / "meminfo").splitlines() if " MemTotal:" in line]
    return int(sizes[0]) << 10 if sizes else 0


def parse_list(text: str) -> list[int]:
    """Parses the kernel's lists of numbers.

    Example:
        >>> parse_list("0-2,8")
        [0, 1, 2, 8]
    """
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def format_list(numbers: Sequence[int]) -> str:
    """The inverse of :func:`parse_list`, for numbers in order.

    Example:
        >>> format_list([0, 1, 2, 8])
        '0-2,8'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def read(path: Path) -> str:
    """Returns the contents of a file, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def set_homes(found: Sequence[Node]) -> None:
    """Makes the schedule of the operators prefer tasks whose weights are on the node of the thread.

    Rows of weights are spread over the nodes by their numbers of cores. With one node, tasks have no home.
    """
    home = {cpu: index for index, node in enumerate(found) for cpu in node.cpus}
    table = [home.get(cpu, cpu % len(found)) for cpu in range(max(home) + 1)]
    torch.ops.kt.set_numa_nodes(table, [len(node.cores) for node in found])
