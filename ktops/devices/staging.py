"""Pinned host memory for copies to and from an accelerator.

A copy overlaps with other work of the device only if its host memory is pinned, and pinning is slow. So
blocks are kept and reused: one that was copied from as soon as its copy has ended.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 4096
"""Bytes of the smallest block; sizes are powers of two."""


def pinned(nbytes: int) -> Tensor:
    """Returns uninitialized bytes in pinned host memory."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def return_pinned() -> None:
    """Returns the pinned memory that PyTorch keeps to the system."""
    if hasattr(torch.accelerator, "empty_host_cache"):  # versions without it keep the memory
        torch.accelerator.empty_host_cache()


@dataclass(eq=False)
class Block:
    """Pinned bytes, and the event after which they may be written again."""

    data: Tensor
    free_after: torch.Event | None = None

    def view(self, like: Tensor) -> Tensor:
        """Returns the first bytes as a contiguous tensor of the shape and dtype of ``like``."""
        return self.data[: like.nbytes].view(like.dtype).view(like.shape)


class Staging:
    """The pinned blocks of the process; a block is used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Block] = []
        self._bytes = 0

    @contextmanager
    def block(self, nbytes: int) -> Iterator[Block]:
        """Lends a block of at least ``nbytes`` that no copy uses."""
        block = self._take(nbytes) or self._new(nbytes)
        try:
            yield block
        finally:
            with self._lock:
                self._idle.append(block)

    def _take(self, nbytes: int) -> Block | None:
        with self._lock:
            fitting = [
                block
                for block in self._idle
                if block.data.nbytes >= nbytes and (block.free_after is None or block.free_after.query())
            ]
            if not fitting:
                return None
            best = min(fitting, key=lambda block: block.data.nbytes)
            self._idle.remove(best)
            best.free_after = None
            return best

    def _new(self, nbytes: int) -> Block:
        size = max(SMALLEST, 1 << (nbytes - 1).bit_length())
        block = Block(pinned(size))
        with self._lock:
            self._bytes += size
        return block

    def bytes(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    def release(self) -> None:
        """Returns the blocks that no thread uses to the system, after the copies that read them."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._bytes -= sum(block.data.nbytes for block in idle)
        for block in idle:
            if block.free_after is not None:
                block.free_after.synchronize()
        if any(block.data.is_pinned() for block in idle):
            idle.clear()
            del block
            return_pinned()
