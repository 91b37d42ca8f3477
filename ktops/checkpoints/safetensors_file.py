"""Reads the header of safetensors files, checking it before any other part of the file is used.

Layout: 8 bytes with the length of the header; the header in JSON; the tensors, contiguous and without gaps.
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
"""F8_E8M0 scales are read as bytes, F4 as bytes with two values each."""

MAX_DIMENSIONS = 16
MAX_HEADER = 100_000_000
"""The largest header that the safetensors library reads."""


def read_views(path: Path) -> dict[str, View]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file is not a safetensors file, is truncated, or does not match its header.
    """
    file = TensorFile(path)
    header, start = _header(file)
    file.metadata = _metadata(header)
    views = {
        name: _view(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"
    }
    position = start
    for view in sorted(views.values(), key=lambda view: (view.offset, view.nbytes)):
        if view.offset != position:
            raise CheckpointError(
                f"{view}: damaged header: the tensor begins at byte {view.offset}, expected {position}"
            )
        position += view.nbytes
    if position != file.size:
        raise CheckpointError(f"{path}: must have {position} bytes according to its header, got {file.size}")
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


def _metadata(header: dict) -> dict[str, str]:
    found = header.get("__metadata__")
    strings = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in strings if isinstance(value, str)}


def _is_list_of_sizes(value) -> TypeGuard[list[int]]:
    """True for a list of sizes, limited in number and size so that their product is cheap to compute."""
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
        raise CheckpointError(f"{where}: shape {shape} or data_offsets {offsets} in the header are not sizes")
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
