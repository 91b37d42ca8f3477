"""int8, int4 and uint4: integers with one scale per row, or per group of columns.

int8   weight int8  [..., N, K]            q * scale
int4   weight uint8 [..., N, ceil(K / 2)]  (q - 8) * scale
uint4  as int4, with a zero point          (q - zero) * scale

In int4 and uint4, byte b holds column 2b in its low nibble and column 2b + 1 in its high nibble.
scale and zero are [..., N, G]; group_size 0 means one group, G = 1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ktops.formats.format import METHODS, Codes, Format, in_groups, scale_dtype, spread
from ktops.formats.half_quadratic import half_quadratic_zero
from ktops.formats.rounding import divide, round_to, shrinking
from ktops.formats.sums import ordered_mean, ordered_sum


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs [..., K] of 0..15 into uint8 [..., ceil(K / 2)], even columns in the low nibbles."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Unpacks uint8 [..., ceil(columns / 2)] into uint8 [..., columns]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :columns]


class Symmetric(Format):
    """Integers in [-high - 1, high] times a scale."""

    methods = ("rtn", "mse")
    has_scale = has_quantizer = True
    group_sizes = (0, -1)
    high: int
    smallest: float

    def _scale(self, groups: Tensor, method: str) -> Tensor:
        """Returns scales [..., G, 1] for weights [..., G, group]."""
        largest = groups.abs().amax(-1, keepdim=True) / self.high
        if method == "rtn":
            return largest
        return in_chunks(self._search, groups, largest)[0]

    def _search(self, groups: Tensor, largest: Tensor) -> tuple[Tensor]:
        """Returns the scales [n, 1] of either sign with the least squared error for weights [n, group]."""
        best, least = largest, torch.full_like(largest, torch.inf)
        integers, errors = torch.empty_like(groups), torch.empty_like(groups)
        for size in shrinking(NUM_SCALES, self.smallest):
            scale = largest * size
            torch.div(groups, torch.where(scale == 0, 1, scale), out=integers).round_()
            for sign, low in ((1, -self.high - 1), (-1, -self.high)):  # -scale reverses the range
                torch.clamp(integers, low, low + 2 * self.high + 1, out=errors).mul_(scale).sub_(groups)
                error = ordered_sum(errors.square_())
                better = error < least
                best, least = torch.where(better, sign * scale, best), torch.where(better, error, least)
        return (best,)

    def _integers(self, weight: Tensor, group_size: int, method: str) -> tuple[Tensor, Tensor]:
        groups = in_groups(weight, group_size)
        scale = self._scale(groups, method).to(scale_dtype(group_size))
        integers = round_to(groups, scale.float(), -self.high - 1, self.high)
        return integers.flatten(-2)[..., : weight.shape[-1]], scale.squeeze(-1)


NUM_SCALES, NUM_RANGES, NUM_FITS = 30, 20, 2
"""How much "mse" tries: NUM_SCALES symmetric scales of either sign, because -8 reaches farther than 7;
NUM_RANGES ranges of uint4 with NUM_FITS least-squares fits each. They are evenly spaced from the largest
weight down to the fraction ``smallest`` of it."""


CHUNK_WEIGHTS = 1 << 17
"""Number of weights searched at a time, so that their floats stay in a core's cache."""


def in_chunks(search: Callable[..., tuple[Tensor, ...]], groups: Tensor, *others: Tensor) -> list[Tensor]:
    """Runs a search on groups [..., G, group] and others [..., G, 1]; each result is [..., G, 1]."""
    count = max(1, CHUNK_WEIGHTS // groups.shape[-1])
    chunks = zip(*(x.flatten(0, -2).split(count) for x in (groups, *others)), strict=True)
    results = zip(*(search(*chunk) for chunk in chunks), strict=True)
    return [torch.cat(parts).view(*groups.shape[:-1], 1) for parts in results]


class Int8(Symmetric):
    name, dtype, high, smallest = "int8", torch.int8, 127, 0.9

    def row_elements(self, columns: int) -> int:
        return columns

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        integers, scale = self._integers(weight, group_size, method)
        return Codes(integers.to(torch.int8), scale)

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None
        return codes.weight.float() * spread(codes.scale, columns, group_size)


class Int4(Symmetric):
    name, dtype, high, smallest = "int4", torch.uint8, 7, 0.4
    default_group_size = 128

    def row_elements(self, columns: int) -> int:
        return -(-columns // 2)

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        integers, scale = self._integers(weight, group_size, method)
        return Codes(pack_nibbles(integers + 8), scale)

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None
        integers = unpack_nibbles(codes.weight, columns).float() - 8
        return integers * spread(codes.scale, columns, group_size)


class UInt4(Format):
    """Integers in [0, 15] minus a zero point, times a scale."""

    name, dtype, smallest = "uint4", torch.uint8, 0.4
    methods = METHODS
    has_scale = has_zero = has_quantizer = True
    group_sizes = (0, -1)
    default_group_size = 128

    def row_elements(self, columns: int) -> int:
        return -(-columns // 2)

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        groups = in_groups(weight, group_size)
        low, high = (
            bound.clamp(*limit)
            for bound, limit in zip(groups.aminmax(dim=-1, keepdim=True), SIGNS, strict=True)
        )
        dtype = scale_dtype(group_size)
        if method == "mse":
            scale, zero = in_chunks(partial(_search, dtype=dtype), groups, low, high)
        else:
            scale, zero = affine(low, high, dtype)
        if method == "hqq":
            zero = half_quadratic_zero(groups, scale.float(), 0 - divide(low, scale.float())).half()
        codes = round_to(groups + scale.float() * zero.float(), scale.float(), 0, 15)
        codes = codes.flatten(-2)[..., : weight.shape[-1]]
        return Codes(pack_nibbles(codes), scale.squeeze(-1), zero.squeeze(-1))

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None and codes.zero is not None
        integers = unpack_nibbles(codes.weight, columns).float() - spread(codes.zero, columns, group_size)
        return integers * spread(codes.scale, columns, group_size)


SIGNS = ((None, 0.0), (0.0, None))
"""The range of every group includes zero, so padding and zeros stay exact."""


def affine(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the scale and the integer zero point (uint8) of the range [low, high]."""
    scale = ((high - low) / 15).to(dtype)
    return scale, round_to(-low, scale.float(), 0, 15).to(torch.uint8)


def _search(groups: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point (float16) with the least squared error.

    Starts from shrunken ranges and fits scale and zero point to the resulting codes. A search over ranges
    alone biases weights toward zero, which affects the sums of a trained layer more than larger unbiased
    errors do.
    """
    scale, zero = affine(low, high, dtype)
    best = scale, zero.half()
    least = _squared_error(groups, *best)
    for size in shrinking(NUM_RANGES, UInt4.smallest):
        scale = (high - low) * (size / 15)
        zero = 7.5 - divide(low + high, 2 * scale)
        for _ in range(NUM_FITS):
            codes = round_to(groups + scale * zero, scale, 0, 15)
            scale, zero = fit(groups, codes, scale)
        fitted = scale.to(dtype), zero.half()
        error = _squared_error(groups, *fitted)
        better = error < least
        best = torch.where(better, fitted[0], best[0]), torch.where(better, fitted[1], best[1])
        least = torch.where(better, error, least)
    return best


def fit(groups: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least-squares scale and zero point for codes; keeps the scale if all codes are equal.

    Sums of integers and of their squares are exact in float32.
    """
    mean, total = ordered_mean(groups), ordered_sum(codes)
    center = total / groups.shape[-1]
    squares = ordered_sum(codes.square()) - total * center
    fitted = divide(ordered_sum(codes * (groups - mean)), squares)
    scale = torch.where(fitted == 0, scale, fitted)
    return scale, center - divide(mean, scale)


def _squared_error(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ordered_sum(_restored(groups, scale.float(), zero.float()).sub_(groups).square_())


def _restored(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return round_to(groups + scale * zero, scale, 0, 15).sub_(zero).mul_(scale)


FORMATS = (Int8(), Int4(), UInt4())
