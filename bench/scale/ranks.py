"""The ranks that measure exchanges and run a layer with expert parallelism."""

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import ktops
from ktops.numa.topology import set_affinity

_CALLS = 5  # at least, of which the fastest counts
_TIMEOUT = datetime.timedelta(hours=2)  # other ranks wait while rank 0 measures alone


def node_cpus() -> list[list[int]]:
    """Returns the CPUs of each NUMA node that this process may use; nodes without any are left out."""
    return [list(node.cpus) for node in ktops.numa.nodes()]


def divide(nodes: list[list[int]], ranks: int, number: int | None = None) -> list[list[int]]:
    """Returns the CPUs of each rank: the nodes' CPUs in order, divided evenly.

    Args:
        nodes: the CPUs of each node.
        number: use this many nodes; default: all.

    Raises:
        ValueError: there are fewer nodes, or fewer CPUs than ranks.
    """
    if number is not None and number > len(nodes):
        raise ValueError(f"nodes must be at most {len(nodes)}, the nodes of this host; got {number}")
    cpus = [cpu for node in nodes[:number] for cpu in node]
    if len(cpus) < ranks:
        raise ValueError(f"ranks must be at most the number of CPUs, {len(cpus)}; got {ranks}")
    cut = [len(cpus) * rank // ranks for rank in range(ranks + 1)]
    return [cpus[a:b] for a, b in pairwise(cut)]


def pin(cpus: list[int]) -> None:
    """Binds all threads of this process to CPUs, and makes torch use one thread for each."""
    set_affinity(cpus)
    torch.set_num_threads(len(cpus))


def clock(threads: int) -> Callable[[], float]:
    """Returns what measures calls on some threads: CPU time of one, which other load does not prolong."""
    return time.process_time if threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks: its CPUs, those of all ranks on its host, and device meshes.

    sharers: the ranks on a NUMA node. together is a mesh of all ranks; apart, of all ranks by one, has a
    second dimension of size 1: the ranks that share a batch in expert parallelism by all_to_all. alone is a
    mesh of this rank only.
    """

    rank: int
    size: int
    cpus: list[int]
    host_cpus: list[int]
    sharers: int
    together: DeviceMesh
    apart: DeviceMesh
    alone: DeviceMesh

    @classmethod
    def join(cls, nodes: int | None = None) -> "Ranks":
        """Joins the ranks that torchrun has started, and binds this one to its CPUs.

        Args:
            nodes: use the CPUs of this many NUMA nodes; default: all.

        Raises:
            ValueError: this host has fewer nodes, or fewer CPUs than ranks.
        """
        found = node_cpus()
        here = divide(found, int(os.environ["LOCAL_WORLD_SIZE"]), nodes)
        cpus = here[int(os.environ["LOCAL_RANK"])]
        pin(cpus)  # before gloo starts its threads
        dist.init_process_group("gloo", timeout=_TIMEOUT)
        rank, size = dist.get_rank(), dist.get_world_size()
        apart = DeviceMesh("cpu", torch.arange(size).view(size, 1), mesh_dim_names=("ep", "tp"))
        host_cpus = [cpu for part in here for cpu in part]
        together = DeviceMesh("cpu", torch.arange(size), mesh_dim_names=("ep",))
        sharers = max(1, len(here) // len(found[:nodes]))
        return cls(rank, size, cpus, host_cpus, sharers, together, apart, apart["tp"])

    @property
    def thread_numbers(self) -> list[int]:
        """One thread, those of a rank, of a NUMA node, and of a host."""
        rank = len(self.cpus)
        return sorted({1, rank, rank * self.sharers, len(self.host_cpus)})

    def slowest(self, call: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
        """Returns the seconds that the slowest rank needs for a call which all ranks make."""
        dist.barrier()
        start = now()
        call()
        seconds = torch.tensor([now() - start], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    def fastest(
        self, call: Callable[[], object], seconds: float, now: Callable[[], float] = time.perf_counter
    ) -> float:
        """Returns the smallest result of :meth:`slowest` in some seconds, after one call to warm up."""
        best, spent, made = float("inf"), self.slowest(call), 0
        while made < _CALLS or spent < seconds:
            took = self.slowest(call, now)
            best, spent, made = min(best, took), spent + took, made + 1
        return best


class Experts:
    """A rank's experts, as transformers' expert parallelism calls them."""

    def __init__(self, weights: dict[str, Any], adapters: dict[str, Any]) -> None:
        self.weights, self.adapters = weights, adapters
        self.num_experts = weights["down_proj"].shape[0]

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Returns [T, H]; ids outside [0, num_experts) are skipped."""
        return ktops.moe_sft(hidden_states, topk_ids, topk_weights, **self.weights, **self.adapters)


class Identity:
    """Experts that return their tokens, weighted."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return hidden_states * topk_weights.sum(1, keepdim=True)


def expert_parallel(name: str, experts, ranks: Ranks, alone: bool = False) -> Callable[..., Tensor]:
    """Returns transformers' EP implementation ("all_reduce" or "all_to_all") around a rank's experts.

    Args:
        alone: exchange with nobody, to measure what surrounds the exchange.
    """
    from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

    if name == "all_reduce":
        mesh = ranks.alone if alone else ranks.together
        return AllReduceEP(experts, mesh, mesh)
    return AllToAllEP(experts, ranks.alone if alone else ranks.apart["ep"], ranks.apart["tp"])


def run(call: Callable[..., Tensor], mode: str, tokens: tuple[Tensor, ...], trained: list[Tensor]) -> tuple:
    """Calls a layer once.

    Args:
        call: takes (hidden_states, topk_ids, topk_weights).
        mode: "forward", or "training" for forward and backward.
        tokens: hidden_states, topk_ids, topk_weights, grad_output.
        trained: tensors besides hidden_states and topk_weights that get gradients.

    Returns:
        (output,), or with training (output, gradients of hidden_states, topk_weights and trained).
    """
    hidden_states, topk_ids, topk_weights, grad_output = tokens
    if mode == "forward":
        with torch.no_grad():
            return (call(hidden_states, topk_ids, topk_weights),)
    leaves = [hidden_states.detach().requires_grad_(), topk_weights.detach().requires_grad_()]
    output = call(leaves[0], topk_ids, leaves[1])
    return output.detach(), *torch.autograd.grad(output, leaves + trained, grad_output, allow_unused=True)
