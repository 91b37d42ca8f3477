"""bind_rank: gives every process of a host its own CPUs, and memory of the same node."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ktops._warn import warn_once
from ktops.numa import system, topology
from ktops.numa.topology import Node, format_list, nodes

VARIABLE = "KTOPS_NUMA_BIND"


@dataclass(frozen=True)
class Binding:
    """What :func:`ktops.numa.bind_rank` gave to this process.

    Attributes:
        local_rank, local_world_size: its number among the processes of this host, and how many there are.
        nodes: the numbers of its NUMA nodes.
        cpus: the CPUs that its threads may use.
        num_threads: the threads that PyTorch uses in it, one per core.
        memory_node: the node whose memory it prefers; None if that is the node of the CPU that a thread is
            on, because the process has CPUs of several nodes or the nodes are pretended.
    """

    local_rank: int
    local_world_size: int
    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    num_threads: int
    memory_node: int | None

    def __str__(self) -> str:
        return (
            f"rank {self.local_rank} of {self.local_world_size} on this host: "
            f"{system.format_nodes(self.nodes)}, CPUs {format_list(self.cpus)}, {self.num_threads} threads"
        )


class AlreadyBoundError(RuntimeError):
    """The launcher of this process has bound it to CPUs."""


_bound: Binding | None = None


def bind_rank(local_rank: int | None = None, local_world_size: int | None = None) -> Binding:
    """Binds this process to its part of the host: CPUs, and memory of their NUMA node.

    The processes of a host are spread over its nodes. Several on a node get disjoint parts of its cores, and
    a process gets several nodes if there are more nodes than processes. All threads of the process, those to
    come included, run on its CPUs. PyTorch uses one thread per core, whatever ``OMP_NUM_THREADS`` says, which
    torchrun sets to 1. Memory is taken from the node as long as it has some, then from others, since a
    process that does not fit on its node should be slower, but not be killed.

    Call it before the model is loaded, because memory that is there already stays where it is. A second call
    returns what the first one did. ``KTOPS_NUMA_BIND=1`` makes ``import ktops`` call it in processes that
    torchrun starts.

    Args:
        local_rank, local_world_size: the number of this process on its host, and how many the host has.
            Default: LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun sets.

    Raises:
        ValueError: the process's number is not known or out of range.
        RuntimeError: this process was bound already, by ``torchrun --numa-binding`` or ``numactl``: it may
            use fewer CPUs than the process that started it. Not noticed where the system does not tell the
            CPUs of that process.

    Example:
        >>> print(ktops.numa.bind_rank())  # in each of two processes
        rank 0 of 2 on this host: node 0, CPUs 0-47, 48 threads
    """
    global _bound
    for name, value in (("local_rank", local_rank), ("local_world_size", local_world_size)):
        if value is not None and type(value) is not int:
            raise TypeError(f"bind_rank: {name} must be an int, got {value!r}")
    rank = _number("local_rank", local_rank, "LOCAL_RANK")
    size = _number("local_world_size", local_world_size, "LOCAL_WORLD_SIZE")
    if not 0 <= rank < size:
        raise ValueError(f"bind_rank: local_rank must be in [0, local_world_size={size}), got {rank}")
    if _bound is not None:
        if (rank, size) != (_bound.local_rank, _bound.local_world_size):
            raise ValueError(f"bind_rank: this process is bound already, as {_bound}, got {rank} of {size}")
        return _bound
    _require_unbound(size)
    found = nodes()
    part = share(found, rank, size)
    if size > sum(len(node.cores) for node in found) and rank == 0:
        warn_once(
            f"ktops.numa.bind_rank: {size} processes share {sum(len(node.cores) for node in found)} cores, "
            "so several run on the same core. Start fewer processes per host (torchrun --nproc-per-node)"
        )
    cpus = {cpu for node in part for cpu in node.cpus}
    topology.set_affinity(cpus)
    threads = sum(len(node.cores) for node in part)
    torch.set_num_threads(threads)
    memory = _prefer_memory(part)
    _bound = Binding(rank, size, tuple(node.id for node in part), tuple(sorted(cpus)), threads, memory)
    os.environ[VARIABLE] = "0"  # processes that this one starts inherit its part, and must not divide it
    if part[0].pretended:  # of the CPUs that are left, which nodes() would divide again
        os.environ[topology.VARIABLE] = str(len(part))
    return _bound


def bind_if_asked() -> None:
    """Calls :func:`bind_rank` if ``KTOPS_NUMA_BIND=1`` and torchrun, or the like, has started this process.

    Raises:
        ValueError: the variable has another value than 0 and 1.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    if asked == "1" and "LOCAL_RANK" in os.environ:
        bind_rank()


def share(found: Sequence[Node], rank: int, size: int) -> list[Node]:
    """Returns the part of the nodes that process ``rank`` of ``size`` gets: whole nodes, or cores of one.

    If there are more processes than cores, some get the same one.
    """
    if size <= len(found):
        return list(found[rank * len(found) // size : (rank + 1) * len(found) // size])
    ranks = [1] * len(found)
    for _ in range(size - len(found)):  # the next process goes where it gets the most cores
        index = max(range(len(found)), key=lambda i: len(found[i].cores) / (ranks[i] + 1))
        ranks[index] += 1
    index = 0
    while rank >= ranks[index]:
        rank -= ranks[index]
        index += 1
    node, number = found[index], ranks[index]
    first, end = rank * len(node.cores) // number, (rank + 1) * len(node.cores) // number
    cores = node.cores[first : max(end, first + 1)]
    return [Node(node.id, cores, node.memory_bytes, node.pretended)]


def _number(name: str, given: int | None, variable: str) -> int:
    if given is not None:
        return given
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ValueError(
            f"bind_rank: {name} must be given, or be in the environment as {variable}, as torchrun sets it, "
            f"got {text!r}"
        )
    return int(text)


def _require_unbound(size: int) -> None:
    own = topology.usable_cpus()
    try:
        parent = topology.affinity(os.getppid())
    except PermissionError:  # of security modules
        return
    if size > 1 and own < parent:
        raise AlreadyBoundError(
            f"bind_rank: this process may only use CPUs {format_list(sorted(own))}, and the one that started "
            f"it CPUs {format_list(sorted(parent))}: torchrun --numa-binding, numactl or taskset has bound "
            f"it already. Leave one of the two out: that, or bind_rank ({VARIABLE}=0)"
        )


def _prefer_memory(part: Sequence[Node]) -> int | None:
    """Makes this thread, and those that it starts, prefer the memory of the part's node; returns the node."""
    if any(node.pretended for node in part):
        return None
    chosen = part[0].id if len(part) == 1 and part[0].memory_bytes else None
    policy = system.Policy(system.MPOL_LOCAL)
    if chosen is not None:
        policy = system.Policy(system.MPOL_PREFERRED, (chosen,))
    try:
        system.set_policy(policy)
    except OSError as error:
        warn_once(
            f"ktops.numa.bind_rank: the memory policy stays as it is ({error.strerror}). Unless something "
            "else has set it, memory comes from the node of the CPU that touches it first, which is the "
            "same as long as the node has some. Containers allow it with --cap-add SYS_NICE"
        )
        return None
    return chosen
