"""The system calls that choose the memory of NUMA nodes. Their errors are OSError."""

import ctypes
import errno
import functools
import os
import platform
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = {"set_mempolicy": 238, "get_mempolicy": 239, "move_pages": 279}
"""Of x86-64, the only architecture that the operators have kernels for."""

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL = range(5)
MPOL_MF_MOVE = 2
MADV_COLD, MADV_POPULATE_READ = 20, 22

MASK_BITS = 1024
WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


class Policy(NamedTuple):
    """Where the memory comes from that a thread touches first: one of MPOL_*, and the nodes it is about."""

    mode: int
    nodes: tuple[int, ...] = ()


def set_policy(policy: Policy) -> None:
    """Sets the policy of this thread, which threads and processes that it starts from now on inherit."""
    mask = (ctypes.c_ulong * (MASK_BITS // WORD_BITS))()
    for node in policy.nodes:
        mask[node // WORD_BITS] |= 1 << node % WORD_BITS
    size = MASK_BITS + 1 if policy.nodes else 0
    _call("set_mempolicy", ctypes.c_int(policy.mode), mask if policy.nodes else None, ctypes.c_ulong(size))


def get_policy() -> Policy:
    """Returns the policy of this thread."""
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * (MASK_BITS // WORD_BITS))()
    _call("get_mempolicy", ctypes.byref(mode), mask, ctypes.c_ulong(MASK_BITS + 1), None, ctypes.c_ulong(0))
    nodes = (node for node in range(MASK_BITS) if mask[node // WORD_BITS] >> node % WORD_BITS & 1)
    return Policy(mode.value, tuple(nodes))


def move_pages(pages: Tensor, nodes: Tensor | None = None) -> Tensor:
    """Moves pages of this process to nodes, or only asks where they are.

    Args:
        pages: int64 [P], the addresses of pages.
        nodes: int32 [P], where to; None: ask.

    Returns:
        int32 [P]: the node of each page, or a negative error number: ENOENT if the page is not in memory,
        EACCES if other processes use it, EBUSY if the kernel or a device does, ENOMEM if the node is full.
    """
    status = torch.full_like(pages, -errno.EBUSY, dtype=torch.int32)  # what a page not reached keeps
    arguments = (pages, nodes, status)
    pointers = (None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments)
    try:
        _call(
            "move_pages", ctypes.c_int(0), ctypes.c_ulong(len(pages)), *pointers, ctypes.c_int(MPOL_MF_MOVE)
        )
    except OSError as error:
        if error.errno != errno.ENOENT:  # of old kernels: no page had to be moved
            raise
    return status


def advise(address: int, size: int, advice: int) -> bool:
    """Calls madvise; returns whether the system took the advice."""
    return _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)) == 0


def split_large_page(address: int) -> None:
    """Splits a large page that contains the page at this address, so that its parts can be moved.

    Linux does so before it marks a part of a large page as cold (since 5.4).
    """
    advise(address, os.sysconf("SC_PAGESIZE"), MADV_COLD)


def describe(error: int) -> str:
    """Returns why a page is where it is, for an error number of :func:`move_pages`."""
    known = {
        errno.ENOENT: "not in memory",
        errno.EFAULT: "not in memory",
        errno.EACCES: "shared with other processes",
        errno.EBUSY: "in use by a device or the kernel",
        errno.ENOMEM: "no room on the node",
    }
    return known.get(error, os.strerror(error))


def _call(name: str, *arguments) -> int:
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"{name}: {os.strerror(errno.ENOSYS)}")
    result = _libc().syscall(ctypes.c_long(NUMBERS[name]), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def format_nodes(numbers: Collection[int]) -> str:
    """Returns "node 0" or "nodes 0, 1"."""
    return f"node{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"
