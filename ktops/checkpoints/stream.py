"""Writes files that appear under their name only when they are complete, and then survive a power failure."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ktops.checkpoints.safetensors_file import DTYPES
from ktops.checkpoints.view import View

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E8M0", "F4")}

ALIGNMENT = 64

COPIED_BYTES = 1 << 24
"""Number of bytes of a view in memory while it is copied."""


class SafetensorsStream:
    """Writes a safetensors file whose tensors may come in any order and in parts, from several threads.

    Until the file is complete, its name ends in ``.tmp``. As a context manager, it finishes the file, or
    discards it after an error.

    Args:
        path: path of the file.
        tensors: dtype and shape of each tensor, by name.
        metadata: strings for the header.

    Attributes:
        nbytes: size of the file.

    Raises:
        OSError: the system cannot write; filename is that of the file.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.temporary = path, temporary_path(path)
        header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offsets, position = {}, 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            offsets[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in offsets.items()}
        self.nbytes = start + position
        self._file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115
        self._write(len(text).to_bytes(8, "little") + text, 0)
        self._file.truncate(self.nbytes)

    def write(self, name: str, tensor: Tensor, index: int = 0) -> None:
        """Writes a tensor, or the slice at an index of its first dimension."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._write(memoryview(data), self._offsets[name] + index * data.nbytes)

    def copy(self, name: str, view: View, begin: int = 0, end: int | None = None) -> None:
        """Writes the bytes of a view, or those in [begin, end), without holding them all in memory."""
        end = view.nbytes if end is None else end
        buffer = memoryview(bytearray(min(end - begin, COPIED_BYTES)))
        for offset in range(begin, end, COPIED_BYTES):
            data = buffer[: min(end - offset, COPIED_BYTES)]
            view.file.read(view.offset + offset, data)
            self._write(data, self._offsets[name] + offset)

    def _write(self, data, offset: int) -> None:
        data = memoryview(data)
        try:
            while data:
                count = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def finish(self) -> None:
        """Gives the complete file its name."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._file.close()
        self.temporary.replace(self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Deletes what has been written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsStream":
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self.finish()
        else:
            self.discard()


def write_json(path: Path, value: dict) -> None:
    """Writes a file that gets its name when it is complete; after an error, there is none."""
    temporary = temporary_path(path)
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Returns the path of a file until it is complete."""
    return path.with_name(path.name + ".tmp")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
