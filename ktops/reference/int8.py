"""How ``compute="int8"`` rounds rows of activations (hidden_states and h = act(g) * u) to integers.

Products of the integers are exact. They are scaled and summed in float32.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Number of columns that share a scale."""

UNIT = 128
"""Number of columns whose blocks may share a scale if they belong to the same group of the weight."""

JOINED_SQUARES = 1.6
"""Sharing scales may increase the sum of the squares of a row's scales, and of its errors, by this factor."""

MOST_JOINED_SQUARES = 2.4
"""The same limit for a unit whose row stays below JOINED_SQUARES; otherwise JOINED_SQUARES applies to it."""

DIGITS = 127 * 128
"""The largest integer with two digits, 128 * high + low."""


def _rounded(x: Tensor, largest: Tensor, most: int) -> Tensor:
    inverse = torch.where(largest * 3e38 > most, most / largest, 0)
    return (x * inverse).round().double() * (largest / most).double()


def largest_of_blocks(x: Tensor, joined: bool) -> Tensor:
    """Returns the max |x| that determines the scale of each block of x [..., K].

    K must be a multiple of UNIT if ``joined``.
    """
    largest = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    if not joined:
        return largest
    units = largest.unflatten(-1, (-1, UNIT // BLOCK))
    most = units.amax(-1, keepdim=True)
    squares, shared = units.square().sum(-1, keepdim=True), units.shape[-1] * most.square()
    row = torch.where(shared <= MOST_JOINED_SQUARES * squares, shared, squares).sum(-2, keepdim=True)
    enough = row <= JOINED_SQUARES * squares.sum(-2, keepdim=True)
    times = torch.where(enough, MOST_JOINED_SQUARES, JOINED_SQUARES)
    return torch.where(shared <= times * squares, most, units).flatten(-2)


def round_blocks(x: Tensor, joined: bool = False) -> Tensor:
    """Rounds every block of x [..., K] to integers up to 127 times the scale max |x| / 127; returns float64.

    The last block of a row may be shorter. A block with a non-finite number becomes NaN.

    Args:
        joined: whether the blocks of a unit may share a scale, which requires weights whose groups are rows
            or multiples of UNIT.

    Example:
        >>> round_blocks(torch.tensor([1.0, 0.4, 127.0])).tolist()
        [1.0, 0.0, 127.0]
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % UNIT))
    largest = largest_of_blocks(padded, joined).unsqueeze(-1)
    return _rounded(padded.unflatten(-1, (-1, BLOCK)), largest, 127).flatten(-2)[..., :columns]


def round_rows(x: Tensor, most: int = 127) -> Tensor:
    """Rounds x [..., K] with one scale per row, max |x| / ``most``; returns float64."""
    x = x.float()
    return _rounded(x, x.abs().amax(-1, keepdim=True), most)


def round_digits(x: Tensor) -> Tensor:
    """Rounds every row of x [..., K] to integers up to 127 * 128 times a scale; returns float64.

    Such an integer has two digits of a byte each. The ``amx_bf16`` kernels use them to multiply many tokens
    with tiles, which do not support scales per block.
    """
    return round_rows(x, DIGITS)
