"""The memory of a machine with several nodes, as move_pages shows it, for machines with one."""

import errno
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ktops.numa import system
from ktops.numa.topology import Node

PAGE, LARGE = 4096, 2 << 20


class FakeMemory:
    """Pages, which are on node 0 at first, and the rules by which Linux moves them.

    Args:
        nodes: the numbers of the nodes.
        shared, busy, absent: pages that other processes use, that a device uses, and of files that nobody has
            read. Addresses.
        room: how many pages fit on each node other than 0.
        is_large: whether all memory consists of large pages, of which Linux moves all or nothing.
        reads_ahead: whether the kernel knows MADV_POPULATE_READ.
    """

    def __init__(
        self,
        nodes: Sequence[int] = (0, 1),
        *,
        shared: Collection[int] = (),
        busy: Collection[int] = (),
        absent: Collection[int] = (),
        room: float = float("inf"),
        is_large: bool = False,
        reads_ahead: bool = True,
    ) -> None:
        self.nodes, self.shared, self.busy = nodes, set(shared), set(busy)
        self.absent, self.room, self.is_large = set(absent), room, is_large
        self.reads_ahead = reads_ahead
        self.node_of: dict[int, int] = {}
        self.split: set[int] = set()
        self.policy = system.Policy(system.MPOL_DEFAULT)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(system, "move_pages", self.move_pages)
        monkeypatch.setattr(system, "split_large_page", lambda address: self.split.add(address // LARGE))
        monkeypatch.setattr(system, "advise", self.advise)
        monkeypatch.setattr(system, "get_policy", lambda: self.policy)
        monkeypatch.setattr(system, "set_policy", lambda policy: setattr(self, "policy", policy))

    def move_pages(self, pages: Tensor, nodes: Tensor | None = None) -> Tensor:
        assert pages.dtype == torch.int64 and all(page % PAGE == 0 for page in pages.tolist())
        if nodes is None:
            return torch.tensor([self.where(page) for page in pages.tolist()], dtype=torch.int32)
        assert nodes.dtype == torch.int32 and len(nodes) == len(pages)
        pairs = zip(pages.tolist(), nodes.tolist(), strict=True)
        return torch.tensor([self.move(page, node) for page, node in pairs], dtype=torch.int32)

    def where(self, page: int) -> int:
        return -errno.ENOENT if page in self.absent else self.node_of.get(page, 0)

    def move(self, page: int, node: int) -> int:
        assert node in self.nodes
        if page in self.absent or self.where(page) == node:
            return self.where(page)
        for pages, error in ((self.shared, errno.EACCES), (self.busy, errno.EBUSY)):
            if page in pages:
                return -error
        if sum(other == node for other in self.node_of.values()) >= self.room and node:
            return -errno.ENOMEM
        moves = [page]
        if self.is_large and page // LARGE not in self.split:
            moves = list(range(page // LARGE * LARGE, (page // LARGE + 1) * LARGE, PAGE))
        for each in moves:
            self.node_of[each] = node
        return node

    def advise(self, address: int, size: int, advice: int) -> bool:
        """Reads what is absent, to the node that the policy prefers."""
        assert advice == system.MADV_POPULATE_READ
        if not self.reads_ahead:
            return False
        assert size == 0 or self.policy.mode == system.MPOL_PREFERRED
        for page in range(address, address + size, PAGE):
            assert page in self.absent
            self.absent.discard(page)
            self.node_of[page] = self.policy.nodes[0]
        return True


def machine(*cores: int, ids: Sequence[int] | None = None, memory: int = 1 << 40) -> tuple[Node, ...]:
    """Returns nodes with these numbers of cores."""
    numbers = range(len(cores)) if ids is None else ids
    first = 0
    nodes = []
    for number, count in zip(numbers, cores, strict=True):
        nodes.append(Node(number, tuple((cpu,) for cpu in range(first, first + count)), memory))
        first += count
    return tuple(nodes)
