"""The ways in which checkpoints store a matrix, told by the tensors there are, and the format each one is.

The tensors of a matrix go by what follows its name: ``weight``, ``weight_scale_inv``, ``qweight`` and so on.
"""

import json

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.packed import Packing, Tensors, awq, gptq, pack_quantized
from ktops.checkpoints.view import View
from ktops.formats import get_format
from ktops.formats.floating import exponents
from ktops.formats.format import FLOAT_SCALES, Codes
from ktops.formats.gguf_blocks import BLOCKS

PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "scales")
"""What the scales of floating-point and 8-bit weights are called."""

IGNORED = ("bias", "input_scale", "input_zero_point", "activation_scale", "weight_g_idx")
"""Tensors that do not say what the weights are: of the activations, or looked up by the scheme itself."""

BLOCK = 128


def matrices(parts: list[Tensors], packing: Packing, *, stacked: bool) -> list[Matrix]:
    """The matrices of a layer's projection, checked: shapes and dtypes, of GPTQ also groups and zero points.

    Args:
        parts: the tensors of each, of all experts.
        packing: what config.json says.
        stacked: two of them stand one above the other, so that blocks of rows must fit together.

    Raises:
        CheckpointError: naming the tensor and the file.
    """
    kinds = {frozenset(tensors) for tensors in parts}
    if len(kinds) > 1:
        _raise_uneven(parts)
    (names,) = kinds
    first = parts[0]
    if {"qweight", "qzeros", "scales"} <= names:
        _expect_no_others(first, "qweight", "qzeros", "scales", "g_idx")
        return _gptq_or_awq(parts, packing)
    return [_matrix(tensors, packing, stacked) for tensors in parts]


def _raise_uneven(parts: list[Tensors]) -> None:
    everything = set().union(*parts)
    for tensors in parts:
        for missing in sorted(everything - set(tensors)):
            kind, known = next(iter(tensors.items()))
            raise CheckpointError(
                f"{known.name.removesuffix(kind)}{missing} is missing in {known.file.path}: other experts "
                "have it"
            )


def _expect_no_others(tensors: Tensors, *known: str) -> None:
    others = sorted(set(tensors) - {*known, *IGNORED})
    if others:
        raise CheckpointError(
            f"{tensors[others[0]]}: unknown scheme: ktops does not know what {', '.join(others)} mean beside "
            f"{', '.join(sorted(set(tensors) - set(others))) or 'nothing else'}"
        )


def _gptq_or_awq(parts: list[Tensors], packing: Packing) -> list[Matrix]:
    qweight, scales = parts[0]["qweight"], parts[0]["scales"]
    expect_dim(qweight, 2)
    expect_dim(scales, 2)
    if qweight.shape[1] == scales.shape[1]:
        return gptq(parts, packing)
    if qweight.shape[1] * 8 == scales.shape[1]:
        return awq(parts, packing)
    raise CheckpointError(
        f"{qweight}: unknown scheme: shape {list(qweight.shape)} with scales {list(scales.shape)} is neither "
        "GPTQ nor AWQ of 4 bits"
    )


def _matrix(tensors: Tensors, packing: Packing, stacked: bool) -> Matrix:
    if "_extra_state" in tensors:
        return _own(tensors)
    if "blocks" in tensors:
        _expect_no_others(tensors, "blocks", "scales")
        return _gpt_oss(tensors)
    if "weight_packed" in tensors:
        return _compressed(tensors, packing)
    if "weight" not in tensors:
        known = next(iter(tensors.values()))
        raise CheckpointError(f"{known}: the weight that belongs to it is missing, or the scheme is unknown")
    weight = tensors["weight"]
    scale = next((tensors[name] for name in SCALES if name in tensors), None)
    _expect_no_others(tensors, "weight", *SCALES)
    if weight.blocks is not None:
        return _gguf(weight)
    expect_dim(weight, 2)
    if weight.dtype in PLAIN:
        if scale is not None:
            raise CheckpointError(f"{scale}: unknown scheme: a scale of weights in {weight.dtype}")
        fields = Fields(Field.of(weight))
        return Matrix(PLAIN[weight.dtype], 0, *weight.shape, fields, PLAIN[weight.dtype], str(weight))
    if scale is None:
        raise CheckpointError(f"{weight}: its scale is missing, or the scheme is unknown: {weight.dtype}")
    return _scaled(weight, scale, stacked)


def _scaled(weight: View, scale: View, stacked: bool) -> Matrix:
    """8-bit and 4-bit weights with a scale, told by dtypes and shapes."""
    rows, columns = weight.shape
    groups = (rows, -(-columns // 32))
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8 and scale.shape == groups:
        return _microscaling("mxfp8", weight, scale)
    if weight.dtype in (torch.int8, torch.uint8) and scale.dtype == torch.uint8:
        return _microscaling("mxfp4", weight, scale)
    if weight.dtype == torch.float8_e4m3fn:
        return _fp8(weight, scale, stacked)
    if weight.dtype == torch.int8:
        return Matrix(
            "int8", 0, rows, columns, Fields(Field.of(weight), _per_row(weight, scale)), "int8", str(weight)
        )
    raise CheckpointError(
        f"{weight}: unknown scheme: {weight.dtype} with a scale {scale.dtype} {list(scale.shape)}"
    )


def _per_row(weight: View, scale: View) -> Field:
    """A scale of every row, [N, 1], from one of them or one of the tensor."""
    rows = weight.shape[0]
    if scale.dtype not in FLOAT_SCALES:
        raise CheckpointError(f"{scale}: must be a floating scale, got {scale.dtype}")
    if scale.shape in ((rows, 1), (rows,)):
        return Field.of(scale.viewed(scale.dtype, rows, 1))
    if scale.shape in ((), (1,), (1, 1)):
        return Field.of(scale).then(lambda t: t.reshape(1, 1).expand(rows, 1), (rows, 1))
    raise CheckpointError(f"{scale}: must have shape {[rows, 1]} or [1], got {list(scale.shape)}")


def _fp8(weight: View, scale: View, stacked: bool) -> Matrix:
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    is_block = scale.shape == blocks and scale.name.endswith("_inv")
    if not is_block and (scale.shape in ((rows, 1), (rows,), (), (1,), (1, 1))):
        fields = Fields(Field.of(weight), _per_row(weight, scale))
        kind = "fp8 per channel" if scale.shape in ((rows, 1), (rows,)) else "fp8 per tensor"
        return Matrix("fp8_e4m3", 0, rows, columns, fields, kind, str(weight))
    expect(scale, blocks, *FLOAT_SCALES, torch.uint8)
    field = Field.of(scale)
    if scale.dtype == torch.uint8:
        field = field.then(exponents, blocks, torch.float32)
    if stacked and rows % BLOCK:
        field = field.then(lambda t: t.repeat_interleave(BLOCK, dim=0)[:rows], (rows, blocks[1]))
    fields = Fields(Field.of(weight), field)
    return Matrix("fp8_e4m3", BLOCK, rows, columns, fields, "fp8 blocks", str(weight))


def _microscaling(name: str, weight: View, scale: View) -> Matrix:
    rows, elements = weight.shape
    columns = elements * (2 if name == "mxfp4" else 1)
    if columns % 32:
        raise CheckpointError(f"{weight}: {name} needs rows of a multiple of 32 weights, got {columns}")
    expect(scale, (rows, columns // 32), torch.uint8)
    if name == "mxfp4":
        weight = weight.viewed(torch.uint8, *weight.shape)
    return Matrix(name, 32, rows, columns, Fields(Field.of(weight), Field.of(scale)), name, str(weight))


def _gpt_oss(tensors: Tensors) -> Matrix:
    """mxfp4, blocks [N, K / 32, 16] and scales [N, K / 32]"""
    blocks, scales = tensors["blocks"], tensors.get("scales")
    if scales is None:
        raise CheckpointError(f"{blocks}: the scales that belong to it are missing")
    expect_dim(blocks, 3)
    rows, groups, _ = blocks.shape
    expect(blocks, (rows, groups, 16), torch.uint8)
    return _microscaling("mxfp4", blocks.viewed(torch.uint8, rows, groups * 16), scales)


def _compressed(tensors: Tensors, packing: Packing) -> Matrix:
    """compressed-tensors' pack-quantized, or its mxfp4-pack-quantized."""
    weight, scale = tensors["weight_packed"], tensors.get("weight_scale")
    if scale is None:
        raise CheckpointError(f"{weight}: weight_scale is missing beside it")
    if weight.dtype == torch.uint8 and scale.dtype == torch.uint8:
        _expect_no_others(tensors, "weight_packed", "weight_scale", "weight_shape")
        expect_dim(weight, 2)
        return _microscaling("mxfp4", weight, scale)
    _expect_no_others(tensors, "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    return pack_quantized(tensors, packing)


def _gguf(weight: View) -> Matrix:
    if weight.blocks not in BLOCKS:
        raise CheckpointError(f"{weight}: unknown scheme: ktops has no format for {weight.blocks}")
    expect_dim(weight, 2)
    rows, size = weight.shape
    block, block_bytes = BLOCKS[weight.blocks]
    columns = size // block_bytes * block
    return Matrix(weight.blocks, 0, rows, columns, Fields(Field.of(weight)), weight.blocks, str(weight))


def own_layout(view: View) -> dict:
    """What ExpertWeight's extra state says: format, shape, group_size."""
    try:
        layout = json.loads(bytes(view.read().tolist()))
        name, (experts, rows, columns), size = layout["format"], layout["shape"], layout["group_size"]
        get_format(name)
        if not all(type(value) is int and value >= 0 for value in (experts, rows, columns, size)):
            raise ValueError("sizes must not be negative")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{view}: is not the layout of an ExpertWeight: {error!r}") from None
    return layout


def _own(tensors: Tensors) -> Matrix:
    """What ktops has written, one expert of it."""
    layout = own_layout(tensors["_extra_state"])
    if "weight" not in tensors:
        raise CheckpointError(f"{tensors['_extra_state']}: the weight that belongs to it is missing")
    weight = tensors["weight"]
    _expect_no_others(tensors, "weight", "scale", "zero", "_extra_state")
    views = [tensors.get(name) for name in ("weight", "scale", "zero")]
    _, rows, columns = layout["shape"]
    stand_ins = (view and torch.empty((1, *view.shape), dtype=view.dtype, device="meta") for view in views)
    try:
        get_format(layout["format"]).check(
            Codes(*stand_ins), torch.Size([1, rows, columns]), layout["group_size"]
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{weight}: {error}") from None
    fields = Fields(*(view and Field.of(view) for view in views))
    return Matrix(layout["format"], layout["group_size"], rows, columns, fields, "ktops", str(weight))


def transposed(tensors: Tensors) -> Matrix:
    """A dense matrix that lies in the file as [K, N]."""
    weight = tensors["weight"]
    _expect_no_others(tensors, "weight")
    expect_dim(weight, 2)
    if weight.dtype not in PLAIN:
        raise CheckpointError(f"{weight}: unknown scheme: transposed weights in {weight.dtype}")
    columns, rows = weight.shape
    name = PLAIN[weight.dtype]
    field = Field.of(weight).then(lambda t: t.T, (rows, columns))
    return Matrix(name, 0, rows, columns, Fields(field), f"{name} transposed", str(weight))


def deinterleaved(matrix: Matrix) -> Matrix:
    """Gate and up in alternate rows -> all rows of the gate, then those of up."""

    def sorted_rows(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[0::2], tensor[1::2]])

    fields = Fields(*(field and field.then(sorted_rows, field.shape) for field in matrix.fields))
    return Matrix(
        matrix.format, matrix.group_size, matrix.rows, matrix.columns, fields, matrix.scheme, matrix.name
    )
