"""Identifies how a checkpoint stores a matrix from its tensors, and maps each scheme to a format.

The tensors of a matrix are named by what follows its name: ``weight``, ``weight_scale_inv``, ``qweight``, ...
"""

import json
import re
from typing import NamedTuple

import torch

from ktops.checkpoints import nvfp4
from ktops.checkpoints.errors import CheckpointError, UnknownScheme
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.microscaling import ggml_mxfp4, gpt_oss, microscaling
from ktops.checkpoints.packed import Packing, Tensors, awq, gptq, pack_quantized
from ktops.checkpoints.quantization_config import QuantizationConfig
from ktops.checkpoints.view import View
from ktops.formats import get_format
from ktops.formats.floating import exponents
from ktops.formats.format import FLOAT_SCALES, Codes
from ktops.formats.gguf_blocks import BLOCKS
from ktops.formats.plain import PLAIN

SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "scales")
"""Names of the scales of floating-point and 8-bit weights."""

OF_ACTIVATIONS = re.compile(
    "(input|output|act|activation|k|v|kv|q|attn|kv_cache)_"
    "(scale|zero_point|global_scale|scale_inv|scale_ub|min|max|amax|observer)"
)
"""Tensors that describe activations, not weights."""

LOOKED_UP = ("bias", "g_idx", "weight_g_idx", "weight_shape")
"""Optional tensors that do not identify a scheme."""

GPTQ = ("qweight", "qzeros", "scales")

OTHERS = {
    "pre_quant_scale": "weights for scaled activations (AWQ of ModelOpt, SmoothQuant)",
    "smooth_scale": "weights for scaled activations",
    "SCB": "LLM.int8 of bitsandbytes",
    "absmax": "4 bits of bitsandbytes",
    "W_q": "HQQ",
    "weight_qdata": "torchao",
    "w_bf16_to_fp8_scale": "AutoRound's integers for FP8 activations",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "trellis": "EXL3",
    "q_weight": "EXL2",
    "B": "Marlin",
    "weight_zero_point": "8 bits with zero points",
}
"""Tensors that identify unsupported schemes."""

BLOCK = 128


def is_of_activations(name: str) -> bool:
    """True if a tensor describes activations, by the part of its name after that of the matrix."""
    return OF_ACTIVATIONS.fullmatch(name) is not None


def matrices(
    parts: list[Tensors], config: QuantizationConfig, *, stacked: bool, moved: bool = False
) -> list[Matrix]:
    """Returns the checked matrices of a layer's projection: shapes, dtypes and, if packed, groups and zeros.

    Args:
        parts: the tensors of each matrix, of all experts; schemes may differ.
        config: the quantization config of the checkpoint, for packed weights.
        stacked: whether gate and up will be stacked, so that blocks of rows must fit together.
        moved: whether rows will be reordered, so that every row needs its own scales.

    Raises:
        CheckpointError: a tensor is missing or wrong; the message names the tensor and the file.
    """
    kinds: dict[frozenset[str], list[int]] = {}
    for index, tensors in enumerate(parts):
        kinds.setdefault(frozenset(tensors).difference(LOOKED_UP), []).append(index)
    _expect_complete(parts, kinds)
    made: dict[int, Matrix] = {}
    try:
        for names, indices in kinds.items():
            alike = [(parts[index], _packing(parts[index], config)) for index in indices]
            made |= zip(indices, _alike(names, alike, _RowUse(stacked, moved)), strict=True)
    except UnknownScheme as error:
        raise UnknownScheme(f"{error} ({config})" if str(config) else str(error)) from None
    return [made[index] for index in range(len(parts))]


def _packing(tensors: Tensors, config: QuantizationConfig) -> Packing:
    kind, view = next(iter(tensors.items()))
    return config.packing(view.name.removesuffix(kind).rstrip("._"))


class _RowUse(NamedTuple):
    """What will be done with the rows of matrices; see :func:`matrices`."""

    stacked: bool
    moved: bool

    def need_own_scales(self, rows: int) -> bool:
        """True if the blocks of a matrix with so many rows would not fit together."""
        return self.moved or (self.stacked and rows % BLOCK > 0)


def _alike(names: frozenset[str], parts: list[tuple[Tensors, Packing]], use: _RowUse) -> list[Matrix]:
    """Returns matrices whose tensors have the same names."""
    if names.issuperset(GPTQ):
        for tensors, _ in parts:
            _expect_no_others(tensors, *GPTQ)
        if _is_gptq(*parts[0]):
            return gptq(parts)
        return [awq(*part) for part in parts]
    return [_matrix(tensors, packing, use) for tensors, packing in parts]


def _expect_complete(parts: list[Tensors], kinds: dict[frozenset[str], list[int]]) -> None:
    """Allows several schemes, but no matrices that have only some of the tensors that others have."""
    for names, indices in kinds.items():
        larger = next((other for other in kinds if names < other), None)
        tensors = parts[indices[0]]
        if larger is None or (names == {"weight"} and tensors["weight"].dtype in PLAIN):
            continue
        kind, known = next(iter(tensors.items()))
        missing = min(larger - names)
        raise CheckpointError(
            f"{known.name.removesuffix(kind)}{missing} is missing in {known.file.path}; other experts have it"
        )


def _expect_no_others(tensors: Tensors, *used: str) -> None:
    others = sorted(set(tensors) - {*used, *LOOKED_UP})
    if others:
        known = ", ".join(sorted(set(tensors) - set(others))) or "nothing else"
        raise UnknownScheme(
            f"{tensors[others[0]]}: unknown scheme: {_called(others)}ktops does not know what "
            f"{', '.join(others)} mean in addition to {known}"
        )


def _called(names: list[str]) -> str:
    return next((f"{OTHERS[name]}: " for name in names if name in OTHERS), "")


def _is_gptq(tensors: Tensors, packing: Packing) -> bool:
    qweight, qzeros, scales = (tensors[name] for name in GPTQ)
    for view in (qweight, qzeros, scales):
        expect_dim(view, 2)
    if qweight.shape[1] == scales.shape[1]:
        return True
    if qweight.shape[1] * 8 == scales.shape[1] or qweight.shape[1] == qzeros.shape[1]:
        return False
    layout = f", but the layout {packing.layout!r}" if packing.layout else ""
    raise UnknownScheme(
        f"{qweight}: unknown scheme: shape {list(qweight.shape)} with scales {list(scales.shape)} is neither "
        f"GPTQ nor AWQ of 4 bits{layout}"
    )


def _matrix(tensors: Tensors, packing: Packing, use: _RowUse) -> Matrix:
    if "_extra_state" in tensors:
        return _own(tensors, use)
    if "blocks" in tensors:
        _expect_no_others(tensors, "blocks", "scales")
        return gpt_oss(tensors)
    if nvfp4.MODELOPT in tensors:
        _expect_no_others(tensors, "weight", "weight_scale", nvfp4.MODELOPT)
        return nvfp4.matrix(tensors)
    if "weight_packed" in tensors:
        return _compressed(tensors, packing)
    if "weight" not in tensors:
        known, called = next(iter(tensors.values())), _called(sorted(tensors))
        raise UnknownScheme(f"{known}: {called}its weight is missing, or the scheme is unknown")
    weight = tensors["weight"]
    scale = next((tensors[name] for name in SCALES if name in tensors), None)
    zero = tensors.get("weight_zero_point")
    if zero is not None and not zero.read().float().any():
        tensors = {name: view for name, view in tensors.items() if view is not zero}
    _expect_no_others(tensors, "weight", *SCALES)
    if weight.blocks is not None:
        return _gguf(weight)
    expect_dim(weight, 2)
    if weight.dtype in PLAIN:
        if scale is not None:
            raise UnknownScheme(f"{scale}: unknown scheme: a scale for weights in {weight.dtype}")
        fields = Fields(Field.of(weight))
        name, (rows, columns) = PLAIN[weight.dtype], weight.shape
        return Matrix(name, 0, rows, columns, fields, name, str(weight))
    if scale is None:
        raise UnknownScheme(f"{weight}: its scale is missing, or the scheme is unknown: {weight.dtype}")
    return _scaled(weight, scale, packing, use)


def _scaled(weight: View, scale: View, packing: Packing, use: _RowUse) -> Matrix:
    """Returns 8-bit and 4-bit weights with a scale, identified by dtypes and shapes."""
    rows, columns = weight.shape
    groups = (rows, -(-columns // 32))
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8 and scale.shape == groups:
        return microscaling("mxfp8", weight, scale)
    if weight.dtype in (torch.int8, torch.uint8) and scale.dtype == torch.uint8:
        _expect_floats(weight, packing)
        return microscaling("mxfp4", weight, scale)
    if weight.dtype == torch.float8_e4m3fn:
        return _fp8(weight, scale, use)
    if weight.dtype == torch.int8:
        return _int8(weight, scale)
    raise UnknownScheme(
        f"{weight}: unknown scheme: {weight.dtype} with a scale {scale.dtype} {list(scale.shape)}"
    )


def _int8(weight: View, scale: View) -> Matrix:
    """Returns int8 weights with a scale per row, per tensor, or per group of columns."""
    rows, columns = weight.shape
    groups = scale.shape[1] if scale.dim == 2 and scale.shape[0] == rows else 1
    if groups <= 1 or columns % groups:
        fields = Fields(Field.of(weight), _per_row(weight, scale))
        return Matrix("int8", 0, rows, columns, fields, "int8", str(weight))
    expect(scale, (rows, groups), *FLOAT_SCALES)
    fields = Fields(Field.of(weight), Field.of(scale))
    return Matrix("int8", columns // groups, rows, columns, fields, "int8", str(weight))


def _expect_floats(weight: View, packing: Packing) -> None:
    """Raises UnknownScheme for integers with E8M0 scales, which have the same tensors as MXFP4."""
    if packing.data_type is not None and "int" in packing.data_type:
        raise UnknownScheme(
            f"{weight}: unknown scheme: 4-bit weights with E8M0 scales must be floats, but the quantization "
            f"config says {packing.data_type}"
        )


def _per_row(weight: View, scale: View) -> Field:
    """Returns a scale per row, [N, 1], from one per row or one per tensor."""
    rows = weight.shape[0]
    if scale.dtype not in FLOAT_SCALES:
        raise CheckpointError(f"{scale}: must be a floating scale, got {scale.dtype}")
    if scale.shape in ((rows, 1), (rows,)):
        return Field.of(scale.viewed(scale.dtype, rows, 1))
    if scale.shape in ((), (1,), (1, 1)):
        return Field.of(scale).then(lambda t: t.reshape(1, 1).expand(rows, 1), (rows, 1))
    raise CheckpointError(f"{scale}: must have shape {[rows, 1]} or [1], got {list(scale.shape)}")


def _fp8(weight: View, scale: View, use: _RowUse) -> Matrix:
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
    if use.need_own_scales(rows):
        field = _of_every_row(field, rows)
    fields = Fields(Field.of(weight), field)
    return Matrix("fp8_e4m3", BLOCK, rows, columns, fields, "fp8 blocks", str(weight))


def _of_every_row(scale: Field, rows: int) -> Field:
    """Repeats the scale of each block of rows for its rows."""
    return scale.then(lambda t: t.repeat_interleave(BLOCK, dim=0)[:rows], (rows, *scale.shape[1:]))


def _compressed(tensors: Tensors, packing: Packing) -> Matrix:
    """Returns weights from compressed-tensors' pack-quantized, mxfp4- or nvfp4-pack-quantized."""
    weight, scale = tensors["weight_packed"], tensors.get("weight_scale")
    if scale is None:
        raise CheckpointError(f"{weight}: weight_scale is missing")
    if nvfp4.COMPRESSED in tensors:
        _expect_no_others(tensors, "weight_packed", "weight_scale", nvfp4.COMPRESSED)
        return nvfp4.matrix(tensors)
    if weight.dtype == torch.uint8 and scale.dtype == torch.uint8:
        _expect_no_others(tensors, "weight_packed", "weight_scale")
        expect_dim(weight, 2)
        _expect_floats(weight, packing)
        return microscaling("mxfp4", weight, scale)
    _expect_no_others(tensors, "weight_packed", "weight_scale", "weight_zero_point")
    return pack_quantized(tensors, packing)


def _gguf(weight: View) -> Matrix:
    if weight.blocks == "mxfp4":
        return ggml_mxfp4(weight)
    if weight.blocks not in BLOCKS:
        raise UnknownScheme(
            f"{weight}: unknown scheme: ktops has no format for {weight.blocks}, shape "
            f"{list(weight.weights_shape)}"
        )
    expect_dim(weight, 2)
    rows, size = weight.shape
    block, block_bytes = BLOCKS[weight.blocks]
    columns = size // block_bytes * block
    return Matrix(weight.blocks, 0, rows, columns, Fields(Field.of(weight)), weight.blocks, str(weight))


def own_layout(view: View) -> dict:
    """Returns format, shape and group_size from ExpertWeight's extra state."""
    try:
        layout = json.loads(bytes(view.read().tolist()))
        name, (experts, rows, columns), size = layout["format"], layout["shape"], layout["group_size"]
        get_format(name)
        if not all(type(value) is int and value >= 0 for value in (experts, rows, columns, size)):
            raise ValueError("sizes must not be negative")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{view}: not the layout of an ExpertWeight: {error!r}") from None
    return layout


def _own(tensors: Tensors, use: _RowUse) -> Matrix:
    """Returns one expert of a layer that ktops wrote."""
    layout = own_layout(tensors["_extra_state"])
    if "weight" not in tensors:
        raise CheckpointError(f"{tensors['_extra_state']}: its weight is missing")
    weight = tensors["weight"]
    _expect_no_others(tensors, "weight", "scale", "zero", "_extra_state")
    views = [tensors.get(name) for name in ("weight", "scale", "zero")]
    _, rows, columns = layout["shape"]
    stand_ins = (view and torch.empty((1, *view.shape), dtype=view.dtype, device="meta") for view in views)
    try:
        get_format(layout["format"]).check(
            Codes._make(stand_ins), torch.Size([1, rows, columns]), layout["group_size"]
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{weight}: {error}") from None
    fields = Fields._make(view and Field.of(view) for view in views)
    if use.moved and fields.scale and fields.scale.shape[0] != rows:
        fields = fields._replace(scale=_of_every_row(fields.scale, rows))
    return Matrix(layout["format"], layout["group_size"], rows, columns, fields, "ktops", str(weight))


def transposed(tensors: Tensors) -> Matrix:
    """Returns a dense matrix that the file stores as [K, N]."""
    weight = tensors["weight"]
    _expect_no_others(tensors, "weight")
    expect_dim(weight, 2)
    if weight.dtype not in PLAIN:
        raise UnknownScheme(f"{weight}: unknown scheme: transposed weights in {weight.dtype}")
    columns, rows = weight.shape
    name = PLAIN[weight.dtype]
    field = Field.of(weight).then(lambda t: t.T, (rows, columns))
    return Matrix(name, 0, rows, columns, Fields(field), f"{name} transposed", str(weight))
