"""Moves the rows of weights to the nodes of the tasks that read them."""

import errno
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktops.numa import system

PAGE = mmap.PAGESIZE
LARGE_PAGE = 2 << 20
CHUNK = 1 << 16
"""Pages per system call, so that Python can be interrupted."""

NOT_READ = "not in memory (this kernel cannot read pages ahead; Linux 5.14 and later can)"


@dataclass
class Pages:
    """The pages of some tensors, in bytes.

    Attributes:
        at_home: on the node of the tasks that read them.
        by_node: in the memory of each node.
        left: not on their node, by the reason.
    """

    at_home: int = 0
    by_node: Counter[int] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Pages") -> None:
        self.at_home += other.at_home
        self.by_node += other.by_node
        self.left += other.left


def homes_of_pages(tensor: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Returns the pages of stacked matrices, and the index of the node that each belongs to.

    A page that holds rows of two nodes, or of two matrices, belongs to the node of the byte in its middle.

    Args:
        tensor: [E, rows, ...]; the elements of a row are contiguous.
        parts: how many matrices are one above the other in the rows: 2 for gate and up.

    Returns:
        int64 [P], addresses in ascending order, and int64 [P], indexes of nodes.
    """
    experts, rows = tensor.shape[:2]
    parts = parts if rows % parts == 0 else 1
    bounds = torch.tensor(torch.ops.kt.numa_rows(rows // parts) or [0, rows // parts])
    expert_stride, row_stride = (tensor.stride(i) * tensor.element_size() for i in (0, 1))
    row_bytes = tensor[0, 0].numel() * tensor.element_size()
    begins = tensor.data_ptr() + torch.arange(experts) * expert_stride
    ends = begins + (rows - 1) * row_stride + row_bytes
    starts = (torch.arange(parts)[:, None] * (rows // parts) + bounds[:-1]).flatten() * row_stride
    starts = (begins[:, None] + starts).flatten()
    owners = torch.arange(len(bounds) - 1).repeat(experts * parts)
    ranges = zip((begins // PAGE).tolist(), (-(-ends // PAGE)).tolist(), strict=True)
    pages = torch.cat([torch.arange(*span) for span in ranges]).unique() * PAGE
    middles = (pages + PAGE // 2).clamp(int(begins[0]), int(ends[-1]) - 1)
    return pages, owners[torch.searchsorted(starts, middles, right=True) - 1]


def locate(pages: Tensor) -> Tensor:
    """Returns int32 [P], the node of each page, or a negative error number; see :func:`system.move_pages`."""
    return torch.cat([system.move_pages(chunk) for chunk in pages.split(CHUNK)])


def missing_bytes(pages: Tensor) -> int:
    """Returns how much of these pages is not in memory."""
    return int(_is_missing(locate(pages)).sum()) * PAGE


def move(pages: Tensor, homes: Tensor, *, read_missing: bool) -> Pages:
    """Moves pages to their nodes, and returns where they are afterward.

    Args:
        pages: int64 [P], addresses in ascending order.
        homes: int64 [P], the numbers of the nodes.
        read_missing: whether pages of files that are not in memory are read, on their node.
    """
    can_read = not read_missing or _read(pages, homes)
    for boundary in pages[1:][(homes[1:] != homes[:-1]) & (pages[1:] % LARGE_PAGE != 0)].tolist():
        system.split_large_page(boundary)
    wanted = homes.to(torch.int32)
    chunks = zip(pages.split(CHUNK), wanted.split(CHUNK), strict=True)
    reached = torch.cat([system.move_pages(*chunk) for chunk in chunks])
    found = locate(pages)
    result = Pages(at_home=int((found == wanted).sum()) * PAGE)
    for node, count in zip(*found[found >= 0].unique(return_counts=True), strict=True):
        result.by_node[int(node)] = int(count) * PAGE
    failed = torch.where(found < 0, found, reached)[found != wanted]
    for code, count in zip(*failed.unique(return_counts=True), strict=True):
        reason = system.describe(-int(code) if code < 0 else errno.EBUSY)
        result.left[reason if can_read or not _is_missing(code) else NOT_READ] += int(count) * PAGE
    return result


def _is_missing(status: Tensor) -> Tensor:
    return (status == -errno.ENOENT) | (status == -errno.EFAULT)


def _read(pages: Tensor, homes: Tensor) -> bool:
    """Reads the pages of files that are not in memory, each with a policy that prefers its node.

    Returns whether the kernel can.
    """
    if not system.advise(0, 0, system.MADV_POPULATE_READ):  # succeeds if the kernel knows the advice
        return False
    missing = _is_missing(locate(pages))
    if not missing.any():
        return True
    before = system.get_policy()
    try:
        for first, last, node in _runs(pages[missing], homes[missing]):
            system.set_policy(system.Policy(system.MPOL_PREFERRED, (node,)))
            system.advise(first, last + PAGE - first, system.MADV_POPULATE_READ)
    finally:
        system.set_policy(before)
    return True


def _runs(pages: Tensor, homes: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields (first page, last page, node) of pages that follow each other and have the same node."""
    ends = (pages.diff() != PAGE) | (homes.diff() != 0)
    firsts = torch.cat([torch.ones(1, dtype=torch.bool), ends])
    lasts = torch.cat([ends, torch.ones(1, dtype=torch.bool)])
    runs = pages[firsts], pages[lasts], homes[firsts]
    yield from zip(*(tensor.tolist() for tensor in runs), strict=True)
