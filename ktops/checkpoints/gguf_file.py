"""Reads the header and tensor list of GGUF files, checking them before any other part of the file is used.

Layout: "GGUF", version, numbers of tensors and of key-value pairs; the pairs; name, dimensions (innermost
first), type and offset of every tensor; padding to the alignment; the tensors.
Source: ggml's docs/gguf.md. A test compares the type numbers with those of the gguf package.
"""

import math
import re
import struct
from pathlib import Path

import torch

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.view import TensorFile, View
from ktops.formats.gguf_blocks import BLOCKS

DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 24: torch.int8, 25: torch.int16,
          26: torch.int32, 27: torch.int64, 28: torch.float64}  # fmt: skip
TYPES = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k",
    14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 39: "mxfp4",
}  # fmt: skip
"""ggml types that ktops has a format for."""

SIZES = {**BLOCKS, "mxfp4": (32, 17)}
"""Format -> (weights, bytes) per block in files. In memory, the scales of mxfp4 are apart from the codes."""

OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Other ggml types, for error messages."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class _Cursor:
    """Reads consecutive values, never past the end."""

    def __init__(self, file: TensorFile) -> None:
        self.file, self.position = file, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.file.size:
            raise CheckpointError(
                f"{self.file.path}: truncated or damaged: the header extends to byte {end} of "
                f"{self.file.size}"
            )
        data = self.file.mapped[self.position : end]
        self.position = end
        return data

    def number(self, code: str):
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self):
        """Returns a value, or None for arrays, which are skipped."""
        kind = self.number("I")
        if kind != ARRAY:
            return self._scalar(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(count):
                self.take(self.number("Q"))
        elif kind in SCALARS:
            self.take(count * struct.calcsize("<" + SCALARS[kind]))
        else:
            raise CheckpointError(f"{self.file.path}: damaged: unknown type {kind} in an array of the header")
        return None

    def _scalar(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise CheckpointError(f"{self.file.path}: damaged: unknown type {kind} in the header")
        return self.number("B" if kind == 7 else SCALARS[kind])


def split_files(path: Path) -> list[Path]:
    """Returns all files of a split model, ``name-00001-of-00003.gguf`` and so on, or else the file itself."""
    match = SPLIT.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{part + 1:05}-of-{count}.gguf") for part in range(int(count))]


def read_views(path: Path) -> dict[str, View]:
    """Returns the tensors of a GGUF file by name. Tensors without a ktops format have rows of 0 bytes.

    Raises:
        CheckpointError: the file is not a GGUF file, or is truncated or damaged.
    """
    file = TensorFile(path)
    if file.size < 24:
        raise CheckpointError(f"{path}: truncated: {file.size} bytes are not a GGUF file")
    cursor = _Cursor(file)
    magic, version = cursor.take(4), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(f"{path}: not a GGUF file of version 2 or 3: begins with {magic!r}, {version}")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    alignment = 32
    for _ in range(num_pairs):
        name, value = cursor.text(), cursor.value()
        if name == "general.alignment":
            alignment = value
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: damaged: general.alignment is {alignment}")
    entries = [_entry(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    views, previous = {}, 0
    for name, dimensions, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        view = _view(file, name, dimensions, kind, start + offset)
        if offset < previous:
            raise CheckpointError(f"{view}: damaged: it begins within the tensor before it")
        previous = offset + view.nbytes
        views[name] = view
    return views


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.text(), cursor.number("I")
    if rank > MAX_DIMENSIONS:
        raise CheckpointError(f"{name!r} in {cursor.file.path}: damaged: {rank} dimensions")
    dimensions = tuple(cursor.number("Q") for _ in range(rank))
    return name, dimensions[::-1], cursor.number("I"), cursor.number("Q")


def _view(file: TensorFile, name: str, shape: tuple[int, ...], kind: int, offset: int) -> View:
    blocks = TYPES.get(kind)
    if blocks is not None:
        weights, size = SIZES[blocks]
        if not shape or shape[-1] % weights:
            raise CheckpointError(
                f"{name} in {file.path}: {blocks} needs rows of a multiple of {weights} weights, got shape "
                f"{list(shape)}"
            )
        view = View(
            name, file, offset, torch.uint8, (*shape[:-1], shape[-1] // weights * size), blocks, shape[-1]
        )
    elif kind in DTYPES:
        view = View(name, file, offset, DTYPES[kind], shape)
    else:
        known = OTHER_TYPES.get(kind, f"ggml type {kind}")
        view = View(name, file, offset, torch.uint8, (*shape[:-1], 0), known, shape[-1] if shape else None)
    if offset + math.prod(view.shape) * view.dtype.itemsize > file.size:
        raise CheckpointError(
            f"{view}: truncated: the tensor ends at byte {offset + view.nbytes} of a file of {file.size}"
        )
    return view
