"""Maps tensors that are scattered over a file so that they lie in memory at equal distances.

Every tensor gets a window: the pages that hold it, mapped at a multiple of the same distance. If all of them
begin at the same place within a page, they form one strided tensor without a copy, in any order, and their
pages are those of the page cache, which processes share.
"""

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.view import MAP_NORESERVE, View

PROT_NONE, MAP_FIXED = 0, 0x10
MAP_FAILED = ctypes.c_void_p(-1).value


def fit_windows(views: Sequence[View]) -> bool:
    """True if :func:`map_windows` can map these parts of files, of one dtype and size, a page or more."""
    first = views[0]
    begin = first.offset % mmap.PAGESIZE
    return (
        first.nbytes >= mmap.PAGESIZE
        and begin % first.dtype.itemsize == 0
        and all(view.offset % mmap.PAGESIZE == begin and view.nbytes == first.nbytes for view in views)
    )


def map_windows(views: Sequence[View], shape: Sequence[int]) -> Tensor:
    """Maps parts of files as one tensor [len(views), *shape], each contiguous; nothing is read until used.

    Args:
        views: parts for which :func:`fit_windows` is true.
        shape: of each part.

    Raises:
        CheckpointError: the system refuses so many mappings, or so many addresses.
    """
    first = views[0]
    begin = first.offset % mmap.PAGESIZE
    window = -(-(begin + first.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = _reserve(len(views) * window)
    for index, view in enumerate(views):
        _map(view, ctypes.addressof(memory) + index * window, window, view.offset - begin)
    itemsize = first.dtype.itemsize
    count = (len(memory) - begin) // itemsize
    flat = torch.frombuffer(memory, dtype=first.dtype, count=count, offset=begin)
    inner = torch.empty(tuple(shape), device="meta").stride()
    return flat.as_strided((len(views), *shape), (window // itemsize, *inner))


def _reserve(size: int) -> ctypes.Array:
    """Returns a range of addresses, which is unmapped with its last user."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        address = _mmap(None, size, PROT_NONE, flags, -1, 0)
    except OSError as error:
        raise CheckpointError(
            f"{size} bytes of addresses cannot be reserved: {error.strerror}. Raise the limit (ulimit -v), "
            "or load without mmap"
        ) from None
    memory = (ctypes.c_uint8 * size).from_address(address)
    release = weakref.finalize(memory, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(size))
    release.atexit = False  # threads may still read it
    return memory


def _map(view: View, address: int, size: int, offset: int) -> None:
    flags = mmap.MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
    try:
        _mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, view.file.descriptor, offset)
    except OSError as error:
        raise CheckpointError(
            f"{view}: cannot be mapped: {error.strerror}. A process may have as many mappings as "
            "/proc/sys/vm/max_map_count says, and every expert takes two: raise it, or load without mmap"
        ) from None


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    found = _libc().mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, descriptor, ctypes.c_long(offset)
    )
    if found == MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    return libc
