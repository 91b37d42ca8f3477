"""MXFP4 and MXFP8: E2M1 or E4M3 codes times a power of two per 32 columns.

DeepSeek, MiniMax   as in ktops' formats: codes [N, K / 2], even columns in the low nibbles, or [N, K]; scales
                    [N, K / 32]
gpt-oss             the same codes as blocks [N, K / 32, 16]
ggml                blocks of 17 bytes: a scale; then 16 bytes of codes, the first 16 of the 32 columns in the
                    low nibbles
"""

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.view import View
from ktops.formats.integer import pack_nibbles


def microscaling(name: str, weight: View, scale: View) -> Matrix:
    rows, elements = weight.shape
    columns = elements * (2 if name == "mxfp4" else 1)
    if columns % 32:
        raise CheckpointError(f"{weight}: {name} needs rows of a multiple of 32 weights, got {columns}")
    expect(scale, (rows, columns // 32), torch.uint8)
    if name == "mxfp4":
        weight = weight.viewed(torch.uint8, *weight.shape)
    return Matrix(name, 32, rows, columns, Fields(Field.of(weight), Field.of(scale)), name, str(weight))


def gpt_oss(tensors: dict[str, View]) -> Matrix:
    """Returns mxfp4 weights from blocks [N, K / 32, 16] and scales [N, K / 32]."""
    blocks, scales = tensors["blocks"], tensors.get("scales")
    if scales is None:
        raise CheckpointError(f"{blocks}: its scales are missing")
    expect_dim(blocks, 3)
    rows, groups, _ = blocks.shape
    expect(blocks, (rows, groups, 16), torch.uint8)
    return microscaling("mxfp4", blocks.viewed(torch.uint8, rows, groups * 16), scales)


def ggml_mxfp4(weight: View) -> Matrix:
    """Returns mxfp4 weights from ggml's blocks."""
    expect_dim(weight, 2)
    rows, size = weight.shape
    groups = size // 17

    def blocks() -> Tensor:
        return weight.read().view(rows, groups, 17)

    def codes() -> Tensor:
        packed = blocks()[..., 1:]
        return pack_nibbles(torch.cat([packed & 15, packed >> 4], dim=-1)).flatten(-2)

    fields = Fields(
        Field((rows, groups * 16), torch.uint8, make=codes),
        Field((rows, groups), torch.uint8, make=lambda: blocks()[..., 0]),
    )
    return Matrix("mxfp4", 32, rows, groups * 32, fields, "mxfp4", str(weight))
