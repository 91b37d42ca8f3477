"""A tensor in a file: where its bytes are, and how to read or map them."""

import math
import mmap
import os
import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Allows private mappings larger than memory; the mmap module has it since Python 3.13."""


class TensorFile:
    """A file of tensors, opened at the first read and closed with its last view.

    Attributes:
        metadata: the strings in the header of a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, dict[str, str]()
        try:
            self.size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    @cached_property
    def descriptor(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    @cached_property
    def mapped(self) -> mmap.mmap:
        """The whole file, shared with every process that maps it until the memory is written to."""
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        return mmap.mmap(self.descriptor, self.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def read(self, offset: int, memory: memoryview) -> None:
        """Fills memory with the bytes starting at offset."""
        while memory:
            count = os.preadv(self.descriptor, [memory], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: truncated: no bytes at {offset}")
            memory, offset = memory[count:], offset + count


@dataclass(frozen=True)
class View:
    """A tensor, or a part of one, in a file.

    Attributes:
        name: name of the whole tensor.
        file, offset: where its bytes begin.
        dtype, shape: of the view.
        blocks: name of the type if these are bytes of ggml blocks.
        columns: number of weights in a row of blocks.
    """

    name: str
    file: TensorFile = field(repr=False)
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: str | None = None
    columns: int | None = None

    def __str__(self) -> str:
        return f"{self.name} in {self.file.path}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dim(self) -> int:
        return len(self.shape)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """The shape in weights; :attr:`shape` if these are not blocks."""
        return self.shape if self.columns is None else (*self.shape[:-1], self.columns)

    def select(self, index: int) -> "View":
        """Returns the slice at an index of the first dimension."""
        part = replace(self, shape=self.shape[1:])
        return replace(part, offset=self.offset + index * part.nbytes)

    def tail(self, count: int) -> "View":
        """Returns the last ``count`` elements of a one-dimensional tensor."""
        first = max(self.shape[0] - count, 0)
        offset = self.offset + first * self.dtype.itemsize
        return replace(self, offset=offset, shape=(self.shape[0] - first,))

    def viewed(self, dtype: torch.dtype, *shape: int) -> "View":
        """Returns the same bytes with another dtype and shape."""
        other = replace(self, dtype=dtype, shape=shape, columns=None)
        assert other.nbytes == self.nbytes
        return other

    def read(self) -> Tensor:
        """Returns a copy in memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Reads into a contiguous tensor of this dtype and shape."""
        assert out.dtype == self.dtype and tuple(out.shape) == self.shape and out.is_contiguous()
        if out.numel():
            self.file.read(self.offset, memoryview(out.view(-1).view(torch.uint8).numpy()))

    def map(self) -> Tensor:
        """Returns a tensor backed by the mapped file; nothing is read until it is used."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        count = math.prod(self.shape)
        flat = torch.frombuffer(self.file.mapped, dtype=self.dtype, count=count, offset=self.offset)
        return flat.view(self.shape)
