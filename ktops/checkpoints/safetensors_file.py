"""Safetensors files: the header, checked before anything of the file is used.

Layout: 8 bytes, the length of the header; the header, JSON; the tensors one after the other, without gaps.
"""

import json
import math
from pathlib import Path
from typing import TypeGuard

import torch

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.view import TensorFile, View

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "F4": torch.uint8,
    "C64": torch.complex64,
}  # fmt: skip
"""Scales F8_E8M0 are read as the bytes that they are, F4 as bytes of two."""

MAX_DIMENSIONS = 16
MAX_HEADER = 100_000_000
"""What the safetensors library reads at most."""


def read_views(path: Path) -> dict[str, View]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file is not one, or truncated, or its header does not fit the file.
    """
    file = TensorFile(path)
    header, start = _header(file)
    views = {
        name: _view(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"
    }
    position = start
    for view in sorted(views.values(), key=lambda view: (view.offset, view.nbytes)):
        if view.offset != position:
            raise CheckpointError(
                f"{view}: begins at byte {view.offset}, where {position} is expected: a damaged header"
            )
        position += view.nbytes
    if position != file.size:
        raise CheckpointError(f"{path}: must have {position} bytes by its header, got {file.size}")
    return views


def _header(file: TensorFile) -> tuple[dict, int]:
    prefix = bytearray(8)
    if file.size < 8:
        raise CheckpointError(f"{file.path}: truncated: {file.size} bytes are not a safetensors file")
    file.read(0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path}: truncated, or not a safetensors file: a header of {length} bytes in a file of "
            f"{file.size}"
        )
    text = bytearray(length)
    file.read(8, memoryview(text))
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: the safetensors header is not an object")
    return header, 8 + length


def _is_list_of_sizes(value) -> TypeGuard[list[int]]:
    """Not too many and none too large, so that their product is soon calculated."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
    )


def _view(file: TensorFile, start: int, name: str, entry) -> View:
    where = f"{name} in {file.path}"
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header entry has no dtype, shape and data_offsets")
    shape, offsets, kind = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not _is_list_of_sizes(shape) or not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape {shape} or data_offsets {offsets} of the header are not sizes")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    begin, end = offsets
    if begin > end or start + end > file.size:
        raise CheckpointError(
            f"{where}: truncated: the tensor ends at byte {start + end} of a file of {file.size}"
        )
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {kind!r}")
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"{where}: F4 needs an even last dimension, got shape {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{where}: {kind} of shape {shape} does not have {end - begin} bytes")
    return View(name, file, start + begin, dtype, tuple(shape))
