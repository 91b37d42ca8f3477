"""Copies the weights of one expert to the buffers from which a server uploads them to its GPUs.

With n GPUs and I intermediate_size, GPU k gets w13, the rows k I/n to (k+1) I/n of gate and then those of up,
and w2, these columns of down. Weights keep their bytes. Scales are written as the servers' kernels read them:

    bf16      none
    int4      bfloat16 [rows, columns / group]
    fp8_e4m3  float32 [ceil(rows / 128), ceil(columns / 128)], or [rows, 1], which is not divided for w2
    mxfp8     uint8 [rows, columns / 32], exponents
    mxfp4     bfloat16 [rows, columns / 32], powers of two
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.formats import Codes, ExpertWeight
from ktops.formats.floating import exponents

BLOCK = 128
"""Rows that share a scale in fp8_e4m3 with blocks."""

SCALES = {"int4": torch.bfloat16, "fp8_e4m3": torch.float32, "mxfp8": torch.uint8, "mxfp4": torch.bfloat16}
"""format -> the dtype of its scales in the buffers."""


class Addresses(NamedTuple):
    """Where to write the parts of an expert for every GPU; 0 for scales that a format does not have."""

    w13: list[int]
    w13_scale: list[int]
    w2: list[int]
    w2_scale: list[int]


def check(
    method: str, gate_up: Tensor | ExpertWeight, down: Tensor | ExpertWeight, expert: int, to: Addresses
) -> None:
    """Raises unless the expert can be written.

    Raises:
        NotImplementedError: servers read no buffers of this format; the message names their option.
        ValueError: no such expert, a missing address, or an intermediate size that cannot be divided.
    """
    format, group_size = _kind(down)
    by_row = format == "int4" and not group_size
    if by_row or format not in ("bf16", *SCALES) or _kind(gate_up) != (format, group_size):
        raise NotImplementedError(
            f"KTMoEWrapper: method {method!r} has no buffers for the prefill on the GPU: start the server "
            "without --kt-gpu-prefill-token-threshold, or with --kt-method BF16, RAWINT4, FP8, "
            "FP8_PERCHANNEL, MXFP4 or MXFP8"
        )
    num_experts, _, size = down.shape
    if not 0 <= expert < num_experts:
        raise ValueError(f"KTMoEWrapper: expert_id must be from 0 to {num_experts - 1}, got {expert}")
    count = len(to.w13)
    unit = max(group_size, 1)
    if not count or size % count or (count > 1 and size // count % unit):
        raise ValueError(
            f"KTMoEWrapper: gpu_tp_count must divide moe_intermediate_size={size} into multiples of {unit}, "
            f"got {count}"
        )
    for name, addresses in to._asdict().items():
        needed = format in SCALES or not name.endswith("_scale")
        if len(addresses) != count or (needed and not all(addresses)):
            raise ValueError(f"KTMoEWrapper: {name} must have {count} addresses, got {list(addresses)}")


def write(gate_up: Tensor | ExpertWeight, down: Tensor | ExpertWeight, expert: int, to: Addresses) -> None:
    """Writes an expert; :func:`check` must have passed."""
    size, count = down.shape[2], len(to.w13)
    first, second = _expert(gate_up, expert), _expert(down, expert)
    for gpu in range(count):
        low, high = gpu * size // count, (gpu + 1) * size // count
        gate, up = (_rows(first, start + low, start + high, *_kind(gate_up)) for start in (0, size))
        _copy(to.w13[gpu], gate.weight, up.weight)
        columns = _columns(second, low, high, size, *_kind(down))
        _copy(to.w2[gpu], columns.weight)
        format = _kind(down)[0]
        if format in SCALES:
            _copy(to.w13_scale[gpu], *(_scale(part.scale, format) for part in (gate, up)))
            _copy(to.w2_scale[gpu], _scale(columns.scale, format))


def _kind(weight: Tensor | ExpertWeight) -> tuple[str, int]:
    """Returns the format and the group size."""
    if isinstance(weight, ExpertWeight):
        return weight.format, weight.group_size
    return ("bf16" if weight.dtype == torch.bfloat16 else str(weight.dtype)), 0


def _expert(weight: Tensor | ExpertWeight, expert: int) -> Codes:
    return weight.expert(expert) if isinstance(weight, ExpertWeight) else Codes(weight[expert])


def _rows(codes: Codes, low: int, high: int, format: str, group_size: int) -> Codes:
    scale = codes.scale
    if scale is not None and format == "fp8_e4m3" and group_size:
        stored_by_row = scale.shape[0] == codes.weight.shape[0]
        scale = scale[low:high:BLOCK] if stored_by_row else scale[low // BLOCK : -(-high // BLOCK)]
    elif scale is not None:
        scale = scale[low:high]
    return Codes(codes.weight[low:high], scale)


def _columns(codes: Codes, low: int, high: int, size: int, format: str, group_size: int) -> Codes:
    """Returns some of the ``size`` columns, and of the rows of scales those that are stored by block."""
    packed = size // codes.weight.shape[1]  # 2 for 4 bits
    scale = codes.scale
    if scale is not None and group_size:
        scale = scale[:, low // group_size : -(-high // group_size)]
        if format == "fp8_e4m3" and scale.shape[0] == codes.weight.shape[0]:
            scale = scale[::BLOCK]
    return Codes(codes.weight[:, low // packed : high // packed], scale)


def _scale(scale: Tensor | None, format: str) -> Tensor:
    assert scale is not None
    return (exponents(scale) if format == "mxfp4" else scale).to(SCALES[format])


def _copy(address: int, *parts: Tensor) -> None:
    """Copies tensors, one after the other, to an address."""
    for part in parts:
        part = part.contiguous()
        ctypes.memmove(address, part.data_ptr(), part.nbytes)
        address += part.nbytes
