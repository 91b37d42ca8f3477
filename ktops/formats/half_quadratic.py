"""Half-quadratic quantization (Badri and Shaji, 2023): the zero points of "hqq"."""

import math

import torch
from torch import Tensor

from ktops.formats.rounding import round_to
from ktops.formats.sums import ordered_mean, ordered_sum

POWER, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20
SMALLEST = 1e-8

SQRT_HALF_BITS = 0x3F3504F3
ARTANH = tuple(2 / math.log(2) / power for power in (1, 3, 5))
"""log2(m) = 2 / ln 2 * artanh(s) with s = (m - 1) / (m + 1), by the first terms of its series."""
EXP2 = tuple(math.log(2) ** power / math.factorial(power) for power in range(7))
"""The Taylor polynomial of 2^r, |r| <= 0.5."""


def half_quadratic_zero(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Minimizes sum |error|^0.7 over the zero point by half-quadratic splitting.

    Alternates between shrinking the error and taking the mean that fits it, with a growing penalty beta.
    """
    beta = BETA
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(STEPS):
        codes = round_to(groups + scale * zero, scale, 0, 15)
        error = groups - (codes - zero) * scale
        size = error.abs()
        slope = power_of(size.clamp_min(SMALLEST), POWER - 1)
        norm = ordered_sum(size * slope)
        better = norm < least
        best, least = torch.where(better, zero, best), torch.where(better, norm, least)
        shrunken = error.sign() * (size - slope / beta).clamp_min(0)
        fitted = ordered_mean(codes - (groups - shrunken) / scale)
        zero = torch.where(scale == 0, zero, fitted)
        beta *= GROWTH
    return best


def power_of(x: Tensor, power: float) -> Tensor:
    """Returns x^power to about 1e-6 with the same bits everywhere, for normal x > 0 and normal results."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    logarithm = exponent.float() + ratio * (ARTANH[0] + square * (ARTANH[1] + square * ARTANH[2]))
    y = logarithm * power
    whole = y.round()
    rest, result = y - whole, torch.full_like(y, EXP2[-1])
    for factor in reversed(EXP2[:-1]):
        result = result * rest + factor
    return (result.view(torch.int32) + (whole.int() << 23)).view(torch.float32)
