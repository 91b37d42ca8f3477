"""numa_placement: puts the weights of experts into the memory of the nodes whose threads read them."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ktops import numa
from ktops._display import format_bytes
from ktops.formats import ExpertWeight
from ktops.integrations.sharded_experts import why_sharded
from ktops.integrations.swap import experts_in_op
from ktops.integrations.transformers.architectures import operands
from ktops.integrations.transformers.outside import ForwardReplacement
from ktops.nn.expert_list import KTExpertList
from ktops.numa import system
from ktops.numa.pages import Pages, homes_of_pages, locate, missing_bytes, move
from ktops.numa.topology import set_homes
from ktops.ops.activation import CONCATENATED

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class PlacementReport:
    """Where the weights of experts are after :func:`ktops.numa_placement`; str() is a summary.

    Sizes are in bytes of whole pages, as the system reports them.

    Attributes:
        nodes: the numbers of the nodes over which the weights are spread.
        layers: the names of the experts modules.
        nbytes: the size of their weights.
        at_home: how much is on the node of the tasks that read it.
        by_node: {node: how much is in its memory}.
        left: {reason: how much is not where it should be}.
        pretended: whether ``KTOPS_NUMA_NODES`` made the nodes up, so that no page was moved.
    """

    nodes: tuple[int, ...]
    layers: tuple[str, ...]
    nbytes: int
    at_home: int
    by_node: dict[int, int]
    left: dict[str, int]
    pretended: bool = False

    def __str__(self) -> str:
        text = f"experts of {len(self.layers)} layers, {format_bytes(self.nbytes)}"
        where = system.format_nodes(self.nodes)
        if self.pretended:
            if len(self.nodes) == 1:
                return f"{text}: pretended {where} is the only one, so tasks prefer none; no page was moved"
            return f"{text}: tasks prefer pretended {where}; no page was moved"
        if not self.by_node and not self.left:
            return f"{text}: {where} is the only one, nothing to move"
        parts = [f"{format_bytes(size)} on node {node}" for node, size in sorted(self.by_node.items())]
        parts.append(f"{self.at_home / (self.at_home + sum(self.left.values())):.1%} on their node")
        parts += [f"left where they are: {format_bytes(size)} {why}" for why, size in self.left.items()]
        return f"{text}: {'; '.join(parts)}"


def numa_placement(model: nn.Module, nodes: str | Sequence[int] = "all") -> PlacementReport:
    """Spreads the weights of a model's experts over NUMA nodes, and makes threads prefer those of their node.

    Every node gets a part of the rows of each expert's gate, up and down projection, in proportion to its
    cores. Forward then reads local memory only; of the two products of backward, the part of the other
    nodes is remote. See "Two sockets" in ``docs/scale.md``. Results do not depend on it, in any bit.

    Pages are moved, not copied: tensors keep their addresses, and weights in files that are mapped
    (``mmap=True``) stay mapped. What is not yet in memory is read on its node, if it fits in the memory that
    is available. Pages that other processes use, too, are left where they are.

    Call it after the model is loaded, quantized or swapped, and again after weights have been replaced. One
    set of nodes holds for the whole process: that of the last call.

    Args:
        model: a model whose experts run through ktops, in CPU memory.
        nodes: the numbers of some of ``ktops.numa.nodes()``; "all" of them. Threads on other nodes help
            where there is work left.

    Returns:
        A :class:`PlacementReport`. With one node there is nothing to do, and it says so. Nodes that
        ``KTOPS_NUMA_NODES`` pretends get their tasks, but no page moves.

    Raises:
        ValueError: nodes are not those of the machine, or their memory may not be used; or the model has no
            experts that ktops runs in CPU memory.
        OSError: the system does not let this process move pages, or choose the node of those that it reads;
            most containers don't. Nothing is moved.

    Example:
        >>> print(ktops.numa_placement(model))
        experts of 48 layers, 54.0 GiB: 27.0 GiB on node 0; 27.0 GiB on node 1; 99.9% on their node
    """
    chosen = _choose(nodes)
    names, _ = experts_in_op(model, "numa_placement")
    for name in names:
        reason = why_sharded(model.get_submodule(name))
        if reason is not None:
            raise ValueError(
                f"numa_placement: {name} cannot be placed: {reason}. Bind each to a node instead"
            )
    tensors = list(_tensors(model, names))
    nbytes = sum(tensor.nbytes for tensor, _ in tensors)
    numbers, pretended = tuple(node.id for node in chosen), chosen[0].pretended
    is_only = len(numa.nodes()) == 1
    if not (is_only or pretended):
        _require_movable(chosen, tensors)
    set_homes(chosen)
    total = Pages()
    if not (is_only or pretended):
        ids = torch.tensor(numbers)
        missing = sum(missing_bytes(homes_of_pages(*each)[0]) for each in tensors)
        read_missing = missing <= _available_bytes()
        for each in tensors:  # one at a time: the list of pages takes 1/256 of their size
            total.add(_move(*each, ids, read_missing))
    return PlacementReport(
        numbers, tuple(names), nbytes, total.at_home, dict(total.by_node), dict(total.left), pretended
    )


def _move(tensor: Tensor, parts: int, ids: Tensor, read_missing: bool) -> Pages:
    pages, indexes = homes_of_pages(tensor, parts)
    return move(pages, ids[indexes], read_missing=read_missing)


def _choose(nodes: str | Sequence[int]) -> list[numa.Node]:
    found = {node.id: node for node in numa.nodes()}
    if isinstance(nodes, str):
        if nodes != "all":
            raise ValueError(f"numa_placement: nodes must be 'all' or numbers of nodes, got {nodes!r}")
        return list(found.values())
    numbers = [number for number in nodes if type(number) is int] if isinstance(nodes, Sequence) else None
    if numbers is None or len(numbers) < len(nodes):
        raise TypeError(f"numa_placement: nodes must be 'all' or a list of integers, got {nodes!r}")
    if not numbers or len(set(numbers)) < len(numbers) or not found.keys() >= set(numbers):
        raise ValueError(
            f"numa_placement: nodes must be different ones of {list(found)}, the nodes on whose CPUs this "
            f"process may run, got {numbers}"
        )
    return [found[number] for number in sorted(numbers)]


def _tensors(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[Tensor, int]]:
    """Yields the tensors of experts' weights as they are stored, [E, rows, ...], and the number of matrices
    that are one above the other in their rows. Tensors that layers share come once."""
    seen = set()
    for name in names:
        gating, weights = _weights(model.get_submodule(name))
        for weight, parts in zip(weights, (2 if gating == CONCATENATED else 1, 1), strict=True):
            for tensor in weight.codes if isinstance(weight, ExpertWeight) else (weight.detach(),):
                if tensor is None or tensor.data_ptr() in seen:
                    continue
                seen.add(tensor.data_ptr())
                is_transposed = tensor.stride(1) == 1 and tensor.shape[2] > 1 and tensor.stride(2) != 1
                yield (tensor.mT, 1) if is_transposed else (tensor, parts)


def _weights(experts: nn.Module) -> tuple[str, tuple[Tensor | ExpertWeight, Tensor | ExpertWeight]]:
    """Returns the gating of experts that ktops runs, and their weights as the op takes them."""
    if isinstance(experts, KTExpertList):
        experts.pack()
        assert experts.packed is not None
        return next(iter(experts)).function.gating, experts.packed[:2]
    if isinstance(experts, ForwardReplacement):
        return experts.gating, experts.weights()
    layout, *weights = operands(experts)
    return layout.function.gating, (weights[0], weights[1])


def _require_movable(chosen: Sequence[numa.Node], tensors: Sequence[tuple[Tensor, int]]) -> None:
    """Raises ValueError or OSError unless pages can be moved to these nodes."""
    closed = [node.id for node in chosen if not node.memory_bytes]
    if closed:
        raise ValueError(
            f"numa_placement: nodes must have memory that this process may use, got {closed} (cpuset.mems "
            "of its container or cgroup)"
        )
    try:
        locate(torch.tensor([tensors[0][0].data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE]))
        system.set_policy(system.get_policy())
    except OSError as error:
        raise OSError(
            error.errno,
            f"numa_placement: the system does not let this process move pages ({error.strerror}). Docker "
            "does with --security-opt seccomp=unconfined, or with a profile that has move_pages, "
            "get_mempolicy and set_mempolicy. Without them, run one process per node (KTOPS_NUMA_BIND=1), or "
            "start this one with numactl --interleave=all",
        ) from None


def _available_bytes() -> int:
    """Returns how much memory the system can give without swapping."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
