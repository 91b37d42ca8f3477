"""NVFP4: E2M1 codes times an E4M3 scale per 16 columns times a float32 scale per matrix.

ModelOpt            weight uint8 [N, K / 2], even columns in the low nibbles; weight_scale float8_e4m3fn
                    [N, K / 16]; weight_scale_2 float32 []. A weight is code * (scale * scale_2)
compressed-tensors  weight_packed, weight_scale, weight_global_scale [1]: code * (scale / global_scale)

ktops has no such format: experts are decoded to float32, to be quantized to another.
"""

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.view import View
from ktops.formats.floating import e2m1

MODELOPT, COMPRESSED = "weight_scale_2", "weight_global_scale"
"""The names of the scale per matrix, which identify the two layouts."""

GROUP = 16


def matrix(tensors: dict[str, View]) -> Matrix:
    """Returns the matrix of tensors that include one named MODELOPT or COMPRESSED, decoded to float32."""
    of_modelopt = MODELOPT in tensors
    name, whole = ("weight", tensors[MODELOPT]) if of_modelopt else ("weight_packed", tensors[COMPRESSED])
    if name not in tensors:
        raise CheckpointError(f"{whole}: its {name} is missing")
    weight, scale = tensors[name], tensors.get("weight_scale")
    if scale is None:
        raise CheckpointError(f"{weight}: weight_scale is missing")
    expect_dim(weight, 2)
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    if columns % GROUP:
        raise CheckpointError(f"{weight}: nvfp4 needs rows of a multiple of {GROUP} weights, got {columns}")
    expect(weight, weight.shape, torch.uint8)
    expect(scale, (rows, columns // GROUP), torch.float8_e4m3fn)
    expect(whole, () if whole.dim == 0 else (1,), torch.float32)

    def dense() -> Tensor:
        per_group, per_matrix = scale.read().float(), whole.read()
        scales = per_group * per_matrix if of_modelopt else per_group / per_matrix
        return e2m1(weight.read(), columns) * scales.repeat_interleave(GROUP, dim=1)

    fields = Fields(Field((rows, columns), torch.float32, make=dense))
    refusal = (
        f"{weight}: ktops has no format for NVFP4. Pass weight_format to quantize the experts to another"
    )
    return Matrix("fp32", 0, rows, columns, fields, "nvfp4", str(weight), refusal)
