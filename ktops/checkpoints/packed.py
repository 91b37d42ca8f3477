"""Four-bit integers in int32 words: GPTQ, AWQ and compressed-tensors' pack-quantized, into int4 and uint4.

GPTQ   qweight int32 [K / 8, N], the lowest nibble first along K; scales [G, N]; qzeros int32 [G, N / 8],
       nibbles one less than the zero point (format "gptq_v2": the zero point); g_idx int32 [K], the group of
       every column
AWQ    qweight int32 [K, N / 8], nibbles along N in the order 0, 2, 4, 6, 1, 3, 5, 7; scales [G, N]; qzeros
       int32 [G, N / 8] in the same order
pack-quantized   weight_packed int32 [N, ceil(K / 8)], the lowest nibble first; weight_scale [N, G];
       weight_zero_point int32 [ceil(N / 8), G], packed along N; weight_g_idx as GPTQ's
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.view import View
from ktops.formats.format import FLOAT_SCALES
from ktops.formats.integer import unpack_nibbles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CHUNK = 128
"""Columns of AWQ weights that are unpacked at a time."""

Tensors = dict[str, View]


class Packing(NamedTuple):
    """What config.json says of packed weights; None: nothing."""

    bits: int | None = None
    group_size: int | None = None
    zero_offset: int = 1


def nibbles(words: Tensor, dim: int = -1) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8 n], the lowest first; along another dimension if asked."""
    words = words.movedim(dim, -1).contiguous()
    return unpack_nibbles(words.view(torch.uint8), words.shape[-1] * 8).movedim(-1, dim)


def _group_size(scales: View, groups: int, columns: int, packing: Packing) -> int:
    size = packing.group_size or 0
    if size <= 0:
        size = 0 if groups == 1 else -(-columns // groups)
    if (1 if size == 0 else -(-columns // size)) != groups:
        raise CheckpointError(
            f"{scales}: must have {1 if size == 0 else -(-columns // size)} groups for {columns} columns and "
            f"group_size {size}, got shape {list(scales.shape)}"
        )
    return 0 if groups == 1 else size


def _expect_4_bits(view: View, packing: Packing) -> None:
    if packing.bits not in (None, 4):
        raise CheckpointError(f"{view}: ktops reads packed weights of 4 bits, got {packing.bits}")


class Gptq(NamedTuple):
    """One matrix in GPTQ's tensors, checked."""

    qweight: View
    qzeros: View
    scales: View
    g_idx: View | None
    group_size: int
    zero_offset: int

    @property
    def rows(self) -> int:
        return self.qweight.shape[1]

    @property
    def columns(self) -> int:
        return self.qweight.shape[0] * 8

    def zeros(self) -> Tensor:
        """uint8 [G, N]"""
        return nibbles(self.qzeros.read()) + self.zero_offset

    def groups(self) -> Tensor:
        """The group of every column, int64 [K]."""
        groups = self.g_idx.read().long()
        if len(groups) and (groups.min() < 0 or groups.max() >= self.scales.shape[0]):
            raise CheckpointError(f"{self.g_idx}: must be groups below {self.scales.shape[0]}")
        return groups

    def is_reordered(self) -> bool:
        if self.g_idx is None or self.group_size == 0:
            return False
        return not torch.equal(self.groups(), torch.arange(self.columns) // self.group_size)

    def codes(self) -> Tensor:
        """uint8 [N, K / 2]: the words along K are the bytes of int4's rows, once transposed."""
        return self.qweight.read().T.contiguous().view(torch.uint8)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K], each column with the scale and zero point of its group, rounded once."""
        scales, zeros, groups = self.scales.read().float(), self.zeros(), self.groups()
        codes, out = self.codes(), torch.empty(self.rows, self.columns, dtype=dtype)
        for row in range(0, self.rows, 128):
            rows = slice(row, row + 128)
            integers = unpack_nibbles(codes[rows], self.columns).float() - zeros[:, rows].T[:, groups]
            out[rows] = integers * scales[:, rows].T[:, groups]
        return out


def gptq(matrices: list[Tensors], packing: Packing) -> list[Matrix]:
    """All matrices of a projection: uint4, int4 if every zero point is 8, or dense if columns of a group are
    apart (act-order)."""
    parts = [_gptq(tensors, packing) for tensors in matrices]
    if any(part.is_reordered() for part in parts):
        dtype = torch.float16 if parts[0].scales.dtype == torch.float16 else torch.bfloat16
        return _dense(parts, dtype)
    symmetric = all(bool((part.zeros() == 8).all()) for part in parts)
    made = []
    for part in parts:
        grouped = part.scales.shape[::-1]
        fields = Fields(
            Field((part.rows, part.columns // 2), torch.uint8, make=part.codes),
            Field.of(part.scales).then(lambda t: t.T, grouped),
            None if symmetric else Field(grouped, torch.uint8, make=lambda part=part: part.zeros().T),
        )
        name = "int4" if symmetric else "uint4"
        made.append(Matrix(name, part.group_size, part.rows, part.columns, fields, "gptq", str(part.qweight)))
    return made


def _gptq(tensors: Tensors, packing: Packing) -> Gptq:
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    _expect_4_bits(qweight, packing)
    expect_dim(qweight, 2)
    expect_dim(scales, 2)
    words, rows = qweight.shape
    groups, columns = scales.shape[0], words * 8
    expect(qweight, (words, rows), torch.int32)
    expect(scales, (groups, rows), *FLOAT_SCALES)
    expect(qzeros, (groups, rows // 8), torch.int32)
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        expect(g_idx, (columns,), torch.int32, torch.int64)
    size = _group_size(scales, groups, columns, packing)
    return Gptq(qweight, qzeros, scales, g_idx, size, packing.zero_offset)


def _dense(parts: list[Gptq], dtype: torch.dtype) -> list[Matrix]:
    name = "fp16" if dtype == torch.float16 else "bf16"
    weights = sum(part.rows * part.columns for part in parts)
    warn_once(
        f"ktops: the GPTQ weights were quantised in an order of their own (desc_act): they are decoded to "
        f"{name}, 16 bits a weight instead of about 4.5. Give weight_format='int4' to quantise them again."
    )
    made = []
    for part in parts:
        weight = Field((part.rows, part.columns), dtype, make=lambda part=part: part.dense(dtype))
        where = f"{part.qweight} ({weights * dtype.itemsize / 1e6:.0f} MB for the projection)"
        made.append(Matrix(name, 0, part.rows, part.columns, Fields(weight), "gptq act-order", where))
    return made


def awq(matrices: list[Tensors], packing: Packing) -> list[Matrix]:
    return [_awq(tensors, packing) for tensors in matrices]


def _awq(tensors: Tensors, packing: Packing) -> Matrix:
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    _expect_4_bits(qweight, packing)
    expect_dim(qweight, 2)
    expect_dim(scales, 2)
    (columns, words), groups = qweight.shape, scales.shape[0]
    rows = words * 8
    expect(qweight, (columns, words), torch.int32)
    expect(scales, (groups, rows), *FLOAT_SCALES)
    expect(qzeros, (groups, words), torch.int32)
    size = _group_size(scales, groups, columns, packing)

    def codes() -> Tensor:
        words = qweight.read()
        out = torch.empty(rows, -(-columns // 2), dtype=torch.uint8)
        for first in range(0, columns, CHUNK):
            unpacked = _in_awq_order(words[first : first + CHUNK]).T
            out[:, first // 2 : (first + CHUNK) // 2] = unpacked[:, 0::2]
            high = unpacked[:, 1::2]
            out[:, first // 2 : first // 2 + high.shape[1]] |= high << 4
        return out

    grouped = (rows, groups)
    fields = Fields(
        Field((rows, -(-columns // 2)), torch.uint8, make=codes),
        Field.of(scales).then(lambda t: t.T, grouped),
        Field.of(qzeros).then(lambda t: _in_awq_order(t).T, grouped, torch.uint8),
    )
    return Matrix("uint4", size, rows, columns, fields, "awq", str(qweight))


def _in_awq_order(words: Tensor) -> Tensor:
    """int32 [n, N / 8] -> uint8 [n, N]"""
    packed = nibbles(words).unflatten(-1, (-1, 8))
    return packed[..., torch.tensor(AWQ_ORDER).argsort()].flatten(-2)


def pack_quantized(tensors: Tensors, packing: Packing) -> Matrix:
    weight, scale = tensors["weight_packed"], tensors["weight_scale"]
    _expect_4_bits(weight, packing)
    expect_dim(weight, 2)
    expect_dim(scale, 2)
    rows, words = weight.shape
    expect(weight, (rows, words), torch.int32)
    columns = words * 8
    shape = tensors.get("weight_shape")
    if shape is not None:
        expect(shape, (2,), torch.int32, torch.int64)
        given = shape.read().tolist()
        if given[0] != rows or -(-given[1] // 8) != words:
            raise CheckpointError(f"{shape}: {given} does not fit weight_packed of shape {[rows, words]}")
        columns = given[1]
    groups = scale.shape[1]
    expect(scale, (rows, groups), *FLOAT_SCALES)
    size = _group_size(scale, groups, columns, packing)
    _expect_in_order(tensors.get("weight_g_idx"), columns, size)
    as_bytes = Field.of(weight.viewed(torch.uint8, rows, words * 4))
    used = -(-columns // 2)
    if used != words * 4:
        as_bytes = as_bytes.then(lambda t: t[:, :used], (rows, used))
    zero = tensors.get("weight_zero_point")
    if zero is None:
        fields = Fields(as_bytes, Field.of(scale))
        return Matrix("int4", size, rows, columns, fields, "pack-quantized", str(weight))
    expect(zero, (-(-rows // 8), groups), torch.int32)
    zeros = Field.of(zero).then(lambda t: nibbles(t, 0)[:rows], (rows, groups), torch.uint8)
    fields = Fields(as_bytes, Field.of(scale), zeros)
    return Matrix("uint4", size, rows, columns, fields, "pack-quantized", str(weight))


def _expect_in_order(g_idx: View | None, columns: int, group_size: int) -> None:
    if g_idx is None or group_size == 0:
        return
    expect(g_idx, (columns,), torch.int32, torch.int64)
    groups = g_idx.read().long()
    if not torch.equal(groups, torch.arange(columns) // group_size) and not (groups == -1).all():
        raise CheckpointError(
            f"{g_idx}: columns of a group that do not lie together are read from GPTQ only: save the "
            "checkpoint with actorder='static'"
        )
