"""Decodes the block formats of ggml on the device that holds the blocks.

Every function takes blocks, uint8 [B, bytes], and returns float32 [B, weights] with the bits that the `gguf`
package returns. "codes" are unsigned integers, "high" their upper bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the codes of iq4_nl and iq4_xs."""


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpacks bytes [..., M] into numbers [..., 8 / bits, M]; number p starts at bit p * bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return packed[..., None, :] >> shifts & (1 << bits) - 1


def half(two_bytes: Tensor) -> Tensor:
    """Converts [B, 2] to float32 [B, 1]."""
    return two_bytes.contiguous().view(torch.float16).float()


def times(d: Tensor, integers: Tensor) -> Tensor:
    """Returns d [B, 1] times the integers of groups [B, G], as [B, G, 1]."""
    return (d * integers.float())[..., None]


def iq4_values(codes: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device="cpu")
    return table.to(codes.device, non_blocking=True)[codes.int()]


def six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks 12 bytes into 8 scales and 8 minima; the last 4 of each have their upper bits in the first."""
    first_scales, first_minima, last = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first_scales & 63, last & 15 | first_scales >> 6 << 4], dim=1)
    return scales, torch.cat([first_minima & 63, last >> 4 | first_minima >> 6 << 4], dim=1)


def single_bits(packed: Tensor) -> Tensor:
    """Unpacks bytes [B, M] into their bits [B, 8 * M], byte by byte."""
    return unpacked(packed, 1).mT.flatten(1)


def q8_0(blocks: Tensor) -> Tensor:
    d, codes = blocks.split([2, 32], dim=1)
    return half(d) * codes.view(torch.int8).float()


def q4_0(blocks: Tensor) -> Tensor:
    d, codes = blocks.split([2, 16], dim=1)
    return half(d) * (unpacked(codes, 4).flatten(1).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    d, minimum, codes = blocks.split([2, 2, 16], dim=1)
    return half(d) * unpacked(codes, 4).flatten(1).float() + half(minimum)


def q5_0(blocks: Tensor) -> Tensor:
    d, high, codes = blocks.split([2, 4, 16], dim=1)
    return half(d) * ((unpacked(codes, 4).flatten(1) | single_bits(high) << 4).float() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    d, minimum, high, codes = blocks.split([2, 2, 4, 16], dim=1)
    return half(d) * (unpacked(codes, 4).flatten(1) | single_bits(high) << 4).float() + half(minimum)


def q2_k(blocks: Tensor) -> Tensor:
    both, codes, d, dmin = blocks.split([16, 64, 2, 2], dim=1)
    codes = unpacked(codes.unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    return (times(half(d), both & 15) * codes.float() - times(half(dmin), both >> 4)).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    high, codes, lower, upper, d = blocks.split([32, 64, 8, 4, 2], dim=1)
    scales = (unpacked(lower, 4).flatten(1) | unpacked(upper, 2).flatten(1) << 4).float() - 32
    codes = unpacked(codes.unflatten(1, (2, 32)), 2).flatten(1) | unpacked(high, 1).flatten(1) << 2
    return (times(half(d), scales) * (codes.unflatten(1, (16, 16)).float() - 4)).flatten(1)


def q4_k(blocks: Tensor) -> Tensor:
    d, dmin, both, codes = blocks.split([2, 2, 12, 128], dim=1)
    scales, minima = six_bits(both)
    codes = unpacked(codes.unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    return (times(half(d), scales) * codes.float() - times(half(dmin), minima)).flatten(1)


def q5_k(blocks: Tensor) -> Tensor:
    d, dmin, both, high, codes = blocks.split([2, 2, 12, 32, 128], dim=1)
    scales, minima = six_bits(both)
    codes = unpacked(codes.unflatten(1, (4, 32)), 4).reshape(-1, 8, 32) | unpacked(high, 1) << 4
    return (times(half(d), scales) * codes.float() - times(half(dmin), minima)).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    codes, high, scales, d = blocks.split([128, 64, 16, 2], dim=1)
    codes = unpacked(codes.unflatten(1, (2, 64)), 4).flatten(1)
    codes = codes | unpacked(high.unflatten(1, (2, 32)), 2).flatten(1) << 4
    groups = codes.unflatten(1, (16, 16)).float() - 32
    return (times(half(d), scales.view(torch.int8)) * groups).flatten(1)


def iq4_nl(blocks: Tensor) -> Tensor:
    d, codes = blocks.split([2, 16], dim=1)
    return half(d) * iq4_values(unpacked(codes, 4).flatten(1))


def iq4_xs(blocks: Tensor) -> Tensor:
    d, upper, lower, codes = blocks.split([2, 2, 4, 128], dim=1)
    scales = unpacked(lower, 4).mT.flatten(1) | unpacked(upper, 2).mT.flatten(1) << 4
    values = iq4_values(unpacked(codes.unflatten(1, (8, 16)), 4).flatten(2))
    return (times(half(d), scales.float() - 32) * values).flatten(1)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs)
}
"""Format -> its function."""
