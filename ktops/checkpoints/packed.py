"""Converts integers in int32 words (GPTQ, AWQ, compressed-tensors' pack-quantized) to int4, uint4 and int8.

A word holds 32 / bits codes. With 4 bits and the lowest code first, words are the bytes of int4's rows.

GPTQ   qweight int32 [K * bits / 32, N], the lowest code first along K; scales [G, N]; qzeros int32
       [G, N * bits / 32], the zero points minus one (in format "gptq_v2", the zero points); g_idx int32 [K],
       the group of every column
AWQ    4 bits: qweight int32 [K, N / 8], nibbles along N in the order 0, 2, 4, 6, 1, 3, 5, 7; scales [G, N];
       qzeros int32 [G, N / 8] in the same order
pack-quantized   weight_packed int32 [N, ceil(K * bits / 32)], the lowest code first; weight_scale [N, G];
       weight_zero_point int32 [ceil(N * bits / 32), G], packed along N, or int8 [N, G], the zero points minus
       the middle of the codes; weight_g_idx as in GPTQ
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.checkpoints.errors import CheckpointError, UnknownScheme
from ktops.checkpoints.matrix import Field, Fields, Matrix, expect, expect_dim
from ktops.checkpoints.quantization_config import Packing
from ktops.checkpoints.view import View
from ktops.formats.format import FLOAT_SCALES
from ktops.formats.integer import unpack_nibbles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CHUNK = 128
"""Number of columns of AWQ weights to unpack at a time."""

WIDTHS = range(1, 9)
LAYOUTS = (None, "gptq", "gptq_v2", "gptq_p", "gemm", "exllama", "ipex")
"""Names of the GPTQ and AWQ layouts above; with 4 and 8 bits, "gptq_p" equals "gptq_v2"."""

Tensors = dict[str, View]


def unpacked(words: Tensor, bits: int = 4, dim: int = -1) -> Tensor:
    """Unpacks int32 [..., n] into uint8 [..., 32 / bits * n] of 4 or 8 bits, lowest first, or along another
    dimension."""
    words = words.movedim(dim, -1).contiguous()
    codes = words.view(torch.uint8)
    return (unpack_nibbles(codes, words.shape[-1] * 8) if bits == 4 else codes).movedim(-1, dim)


def signed(codes: Tensor) -> Tensor:
    """Converts uint8 codes of 8 bits to int8 by subtracting 128."""
    return (codes ^ 128).view(torch.int8)


def _group_size(scales: View, groups: int, columns: int, packing: Packing) -> int:
    """Derives the group size from the shapes. The config's, if it fits them, allows a shorter last group."""
    if groups == 1:
        return 0
    size = packing.group_size or 0
    if size > 0 and -(-columns // size) == groups:
        return size
    if columns % max(groups, 1) or not groups:
        known = f" and group_size {size}" if size > 0 else ""
        raise CheckpointError(
            f"{scales}: must have a number of groups that fits {columns} columns{known}, got shape "
            f"{list(scales.shape)}"
        )
    return columns // groups


def _width(fits: list[int], packing: Packing) -> int:
    """Returns the bits per weight that fit the shapes: the config's if possible, otherwise 4, otherwise 8."""
    return next((bits for bits in (packing.bits, 4, 8) if bits in fits), fits[0] if fits else 4)


def _fitting(words: int, count: int, among=WIDTHS) -> list[int]:
    """Returns the bit widths for which ``count`` codes fill exactly ``words`` words."""
    return [bits for bits in among if words == -(-count * bits // 32)]


def _expect_readable(view: View, bits: int, symmetric: bool = True) -> None:
    if bits not in (4, 8) or (bits == 8 and not symmetric):
        given = f"{bits} bits" if symmetric else f"{bits} bits with other zero points"
        raise CheckpointError(
            f"{view}: packed weights must have 4 bits, or 8 bits with a zero point of 128, got {given}"
        )


class Gptq(NamedTuple):
    """The checked GPTQ tensors of one matrix."""

    qweight: View
    qzeros: View
    scales: View
    g_idx: View | None
    bits: int
    group_size: int
    zero_offset: int | None
    symmetric: bool | None

    @property
    def rows(self) -> int:
        return self.qweight.shape[1]

    @property
    def columns(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    def stored_zeros(self) -> Tensor:
        """Returns the zero points as stored in the file, uint8 [G, N]."""
        return unpacked(self.qzeros.read(), self.bits)[:, : self.rows]

    def zeros(self) -> Tensor:
        """Returns the zero points, int16 [G, N]."""
        if self.symmetric:
            return torch.full(self.scales.shape, self.middle, dtype=torch.int16)
        assert self.zero_offset is not None
        return self.stored_zeros().to(torch.int16) + self.zero_offset

    def groups(self) -> Tensor:
        """Returns the group of every column, int64 [K]."""
        assert self.g_idx is not None
        groups = self.g_idx.read().long()
        if len(groups) and (groups.min() < 0 or groups.max() >= self.scales.shape[0]):
            raise CheckpointError(f"{self.g_idx}: must hold group indices below {self.scales.shape[0]}")
        return groups

    def is_reordered(self) -> bool:
        if self.g_idx is None or self.group_size == 0:
            return False
        return not torch.equal(self.groups(), torch.arange(self.columns) // self.group_size)

    def codes(self) -> Tensor:
        """Returns uint8 [N, K / 2], or [N, K]; transposed words along K are the bytes of int4's rows."""
        return self.qweight.read().T.contiguous().view(torch.uint8)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns [N, K], decoded with the scale and zero point of each column's group, rounded once."""
        scales, zeros, groups = self.scales.read().float(), self.zeros(), self.groups()
        codes, out = self.codes(), torch.empty(self.rows, self.columns, dtype=dtype)
        for row in range(0, self.rows, 128):
            rows = slice(row, row + 128)
            integers = unpack_nibbles(codes[rows], self.columns) if self.bits == 4 else codes[rows]
            out[rows] = (integers.float() - zeros[:, rows].T[:, groups]) * scales[:, rows].T[:, groups]
        return out

    def matrix(self, symmetric: bool) -> Matrix:
        grouped, size, where = self.scales.shape[::-1], self.group_size, str(self.qweight)
        scale = Field.of(self.scales).then(lambda t: t.T, grouped)
        if self.bits == 8:
            shape = (self.rows, self.columns)
            codes = Field(shape, torch.int8, make=lambda: signed(self.codes()))
            return Matrix("int8", size, *shape, Fields(codes, scale), "gptq", where)
        codes = Field((self.rows, self.columns // 2), torch.uint8, make=self.codes)
        zero = Field(grouped, torch.uint8, make=lambda: self.zeros().T.to(torch.uint8))
        fields = Fields(codes, scale, None if symmetric else zero)
        return Matrix("int4" if symmetric else "uint4", size, self.rows, self.columns, fields, "gptq", where)


def gptq(matrices: list[tuple[Tensors, Packing]]) -> list[Matrix]:
    """Returns all matrices of a projection: uint4, or int4 and int8 if every zero point is the middle, or
    dense if the columns of a group are not adjacent (act-order)."""
    parts = [_gptq(tensors, packing) for tensors, packing in matrices]
    if any(part.is_reordered() for part in parts):
        dtype = torch.float16 if parts[0].scales.dtype == torch.float16 else torch.bfloat16
        return _dense(parts, dtype)
    symmetric: dict[int, bool] = {}
    for part in parts:
        same = part.symmetric or bool((part.zeros() == part.middle).all())
        _expect_readable(part.qweight, part.bits, same)
        symmetric[part.bits] = symmetric.get(part.bits, True) and same
    return [part.matrix(symmetric[part.bits]) for part in parts]


def _gptq(tensors: Tensors, packing: Packing) -> Gptq:
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for view in (qweight, qzeros, scales):
        expect_dim(view, 2)
    _expect_layout(qweight, packing)
    words, rows = qweight.shape
    groups, g_idx = scales.shape[0], tensors.get("g_idx")
    fits = _fitting(qzeros.shape[1], rows)
    if g_idx is not None and g_idx.dim == 1:
        fits = _fitting(words, g_idx.shape[0], fits)
    bits = _width(fits, packing)
    _expect_readable(qweight, bits)
    columns = words * 32 // bits
    expect(qweight, (words, rows), torch.int32)
    expect(scales, (groups, rows), *FLOAT_SCALES)
    expect(qzeros, (groups, -(-rows * bits // 32)), torch.int32)
    if g_idx is not None:
        expect(g_idx, (columns,), torch.int32, torch.int64)
    size = _group_size(scales, groups, columns, packing)
    made = Gptq(qweight, qzeros, scales, g_idx, bits, size, packing.zero_offset, packing.symmetric)
    return _with_known_zeros(made)


def _with_known_zeros(part: Gptq) -> Gptq:
    """Warns if zero points contradict the config, or if nothing says how they are stored."""
    if part.zero_offset is not None and not part.symmetric:
        return part
    stored = part.stored_zeros()
    middle = [bool((stored + offset == part.middle).all()) for offset in (0, 1)]
    folder = part.qzeros.file.path.parent
    if part.symmetric:
        if not (any(middle) if part.zero_offset is None else middle[part.zero_offset]):
            warn_once(
                f"ktops: the zero points of the GPTQ weights in {folder} are assumed to be {part.middle}, as "
                "the quantization config says (sym: true), although qzeros holds other values"
            )
        return part
    offset = 0 if middle[0] else 1
    if not middle[1]:
        warn_once(
            f"ktops: nothing in {folder} specifies how the zero points of the GPTQ weights are stored; "
            f"assuming {'unchanged, as in gptq_v2' if middle[0] else 'minus one, as in gptq'}. If that is "
            "wrong, set checkpoint_format in quantize_config.json"
        )
    return part._replace(zero_offset=offset)


def _expect_layout(view: View, packing: Packing) -> None:
    if packing.layout not in LAYOUTS:
        raise UnknownScheme(f"{view}: unknown scheme: the layout {packing.layout!r} of packed weights")


def _dense(parts: list[Gptq], dtype: torch.dtype) -> list[Matrix]:
    name = "fp16" if dtype == torch.float16 else "bf16"
    weights = sum(part.rows * part.columns for part in parts)
    warn_once(
        f"ktops: the GPTQ weights were quantized with reordered columns (desc_act), so they are decoded to "
        f"{name}, 16 bits per weight instead of about 4.5. Pass weight_format='int4' to quantize them again."
    )
    made = []
    for part in parts:
        weight = Field((part.rows, part.columns), dtype, make=partial(part.dense, dtype))
        where = f"{part.qweight} ({weights * dtype.itemsize / 1e6:.0f} MB for the projection)"
        made.append(Matrix(name, 0, part.rows, part.columns, Fields(weight), "gptq act-order", where))
    return made


def awq(tensors: Tensors, packing: Packing) -> Matrix:
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for view in (qweight, qzeros, scales):
        expect_dim(view, 2)
    _expect_layout(qweight, packing)
    (columns, words), (groups, rows) = qweight.shape, scales.shape
    bits = _width(_fitting(words, rows), packing)
    if bits != 4:
        raise CheckpointError(f"{qweight}: AWQ weights must have 4 bits, got {bits} bits")
    expect(qweight, (columns, rows // 8), torch.int32)
    expect(scales, (groups, words * 8), *FLOAT_SCALES)
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
    """Unpacks int32 [n, N / 8] in AWQ's order into uint8 [n, N]."""
    packed = unpacked(words).unflatten(-1, (-1, 8))
    return packed[..., torch.tensor(AWQ_ORDER).argsort()].flatten(-2)


def pack_quantized(tensors: Tensors, packing: Packing) -> Matrix:
    weight, scale = tensors["weight_packed"], tensors["weight_scale"]
    expect_dim(weight, 2)
    expect_dim(scale, 2)
    rows, words = weight.shape
    expect(weight, (rows, words), torch.int32)
    bits, columns = _width_and_columns(tensors, packing)
    _expect_readable(weight, bits)
    groups = scale.shape[1]
    expect(scale, (rows, groups), *FLOAT_SCALES)
    size = _group_size(scale, groups, columns, packing)
    _expect_in_order(tensors.get("weight_g_idx"), columns, size)
    zeros = _packed_zeros(tensors, packing, bits, (rows, groups))
    codes = Field.of(weight.viewed(torch.uint8, rows, words * 4))
    if bits == 8:
        _expect_readable(weight, bits, zeros is None or bool((zeros.read() == 128).all()))
        codes = codes.then(lambda t: signed(t[:, :columns]), (rows, columns), torch.int8)
        fields = Fields(codes, Field.of(scale))
        return Matrix("int8", size, rows, columns, fields, "pack-quantized", str(weight))
    used = -(-columns // 2)
    if used != words * 4:
        codes = codes.then(lambda t: t[:, :used], (rows, used))
    name = "int4" if zeros is None else "uint4"
    fields = Fields(codes, Field.of(scale), zeros)
    return Matrix(name, size, rows, columns, fields, "pack-quantized", str(weight))


def _width_and_columns(tensors: Tensors, packing: Packing) -> tuple[int, int]:
    """Returns bits and columns from weight_shape, or from the config if there is none."""
    weight, shape = tensors["weight_packed"], tensors.get("weight_shape")
    rows, words = weight.shape
    if shape is None:
        bits = packing.bits if packing.bits and packing.bits in WIDTHS else 4
        return bits, words * 32 // bits
    expect(shape, (2,), torch.int32, torch.int64)
    given = shape.read().tolist()
    fits = _fitting(words, given[1])
    if given[0] != rows or not fits:
        raise CheckpointError(f"{shape}: {given} does not fit weight_packed of shape {[rows, words]}")
    return _width(fits, packing), given[1]


def _packed_zeros(tensors: Tensors, packing: Packing, bits: int, shape: tuple[int, int]) -> Field | None:
    zero, rows = tensors.get("weight_zero_point"), shape[0]
    if zero is None:
        if packing.symmetric is False:
            weight = tensors["weight_packed"]
            raise CheckpointError(
                f"{weight}: weight_zero_point is missing, but the quantization config says symmetric: false"
            )
        return None
    if zero.dtype == torch.int8:
        expect(zero, shape)
        return Field.of(zero).then(lambda t: t.view(torch.uint8) + (1 << bits - 1), shape, torch.uint8)
    expect(zero, (-(-rows * bits // 32), shape[1]), torch.int32)
    return Field.of(zero).then(lambda t: unpacked(t, bits, 0)[:rows], shape, torch.uint8)


def _expect_in_order(g_idx: View | None, columns: int, group_size: int) -> None:
    if g_idx is None or group_size == 0:
        return
    expect(g_idx, (columns,), torch.int32, torch.int64)
    groups = g_idx.read().long()
    if not torch.equal(groups, torch.arange(columns) // group_size) and not (groups == -1).all():
        raise CheckpointError(
            f"{g_idx}: groups with non-adjacent columns are supported only in GPTQ. Save the checkpoint with "
            "actorder='static'"
        )
