"""fp8_e4m3, mxfp8 and mxfp4: small floating-point numbers times a scale.

fp8_e4m3  weight float8_e4m3fn [..., N, K]; scale float [..., N, 1] (group_size 0). With group_size 128, one
          scale per block of 128 x 128, [..., ceil(N / 128), ceil(K / 128)], or per 128 columns of a row,
          [..., N, ceil(K / 128)]
mxfp8     weight float8_e4m3fn [..., N, K]; scale uint8 [..., N, K / 32], meaning 2^(scale - 127)
mxfp4     weight uint8 [..., N, K / 2], E2M1 codes, even columns in the low nibbles; scale as in mxfp8

Sources: OCP Microscaling Formats (MX) 1.0; DeepSeek-V3's checkpoints for the 128 x 128 blocks.
"""

import torch
from torch import Tensor

from ktops.formats.format import (
    FLOAT_SCALES,
    NAN_EXPONENT,
    Codes,
    Format,
    expect,
    in_groups,
    num_groups,
    spread,
)
from ktops.formats.integer import pack_nibbles, unpack_nibbles

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of mxfp4's codes 0 to 7; 8 to 15 are their negatives."""

FP8_MAX, FP8_MAX_EXPONENT = 448.0, 8
E2M1_MAX_EXPONENT = 2


class Fp8(Format):
    name, dtype = "fp8_e4m3", torch.float8_e4m3fn
    has_scale = has_quantizer = True
    group_sizes = (0, 128)
    default_group_size = 128

    def row_elements(self, columns: int) -> int:
        return columns

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, ...]:
        return rows if group_size == 0 else -(-rows // group_size), num_groups(columns, group_size)

    def check(self, codes: Codes, shape: torch.Size, group_size: int) -> None:
        scale, (num_experts, rows, columns) = codes.scale, shape
        if group_size and scale is not None and scale.dim() == 3 and scale.shape[1] == rows:
            self.check_group_size(group_size)
            expect("weight", codes.weight, (self.dtype,), tuple(shape))
            expect("scale", scale, FLOAT_SCALES, (num_experts, rows, num_groups(columns, group_size)))
            if codes.zero is not None:
                raise ValueError(f"zero must be None for format {self.name!r}, got a tensor")
            return
        super().check(codes, shape, group_size)

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        rows, columns = weight.shape[-2:]
        if group_size == 0:
            largest = weight.abs().amax(-1, keepdim=True)
        else:
            blocks = in_groups(in_groups(weight, group_size).abs().amax(-1).mT, group_size)
            largest = blocks.amax(-1).mT
        scale = (largest / FP8_MAX).float()
        per_weight = self._spread(scale, rows, columns, group_size)
        codes = torch.where(per_weight == 0, 0, weight / per_weight).clamp(-FP8_MAX, FP8_MAX)
        return Codes(codes.to(self.dtype), scale)

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None
        rows = codes.weight.shape[-2]
        return codes.weight.float() * self._spread(codes.scale, rows, columns, group_size)

    @staticmethod
    def _spread(scale: Tensor, rows: int, columns: int, group_size: int) -> Tensor:
        if group_size and scale.shape[-2] != rows:
            scale = scale.repeat_interleave(group_size, dim=-2)[..., :rows, :]
        return spread(scale, columns, group_size)


class Microscaling(Format):
    """Groups of 32 columns, each scaled by a power of two."""

    has_scale = has_quantizer = True
    group_sizes = (32,)
    default_group_size = 32
    max_exponent: int

    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def row_elements(self, columns: int) -> int:
        if columns % 32:
            raise ValueError(f"format {self.name!r} needs rows of a multiple of 32 weights, got {columns}")
        return columns

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights [..., K] divided by their scales, and the scales as uint8 exponents.

        A scale is 2^(floor(log2(largest)) - max_exponent).
        """
        groups = in_groups(weight, 32)
        largest = groups.abs().amax(-1)
        exponent = torch.where(largest == 0, -127, torch.frexp(largest).exponent - 1 - self.max_exponent)
        scale = torch.where(largest.isfinite(), exponent.clamp(-127, 127) + 127, NAN_EXPONENT)
        return (groups * exponents(254 - scale)[..., None]).flatten(-2), scale.to(torch.uint8)


def e2m1(codes: Tensor, columns: int) -> Tensor:
    """Converts packed codes, uint8 [..., columns / 2], to float32 [..., columns]."""
    values = torch.tensor(E2M1, device="cpu").to(codes.device, non_blocking=True)
    return torch.cat([values, -values])[unpack_nibbles(codes, columns).int()]


def exponents(scale: Tensor) -> Tensor:
    """Converts uint8 scales to float32 2^(scale - 127); 255 is NaN."""
    powers = torch.exp2(scale.double() - 127).float()
    return torch.where(scale == NAN_EXPONENT, torch.nan, powers)


class MxFp8(Microscaling):
    name, dtype, max_exponent = "mxfp8", torch.float8_e4m3fn, FP8_MAX_EXPONENT

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        scaled, scale = self._scaled(weight)
        return Codes(scaled.clamp(-FP8_MAX, FP8_MAX).to(self.dtype), scale)

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None
        return codes.weight.float() * spread(exponents(codes.scale), columns, group_size)


class MxFp4(Microscaling):
    name, dtype, max_exponent = "mxfp4", torch.uint8, E2M1_MAX_EXPONENT

    def row_elements(self, columns: int) -> int:
        return super().row_elements(columns) // 2

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        scaled, scale = self._scaled(weight)
        levels = torch.tensor(E2M1)
        codes = torch.bucketize(scaled.abs(), (levels[1:] + levels[:-1]) / 2)
        return Codes(pack_nibbles(codes | (scaled < 0) * 8), scale)

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        assert codes.scale is not None
        return e2m1(codes.weight, columns) * spread(exponents(codes.scale), columns, group_size)


FORMATS = (Fp8(), MxFp8(), MxFp4())
