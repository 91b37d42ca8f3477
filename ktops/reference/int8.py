"""What ``compute="int8"`` makes of rows of activations: of hidden_states and of h = act(g) * u.

Products of the integers are exact; they are scaled and added up in float32.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Columns that share a scale."""

UNIT = 128
"""Columns whose blocks may share one, where they belong to one group of the weight."""

JOINED_SQUARES = 1.6
"""How many times the squares of a row's scales may add up to what they would else: the errors' do too."""

MOST_JOINED_SQUARES = 2.4
"""The same of a unit, if the row stays below JOINED_SQUARES; if not, a unit must."""

DIGITS = 127 * 128
"""The largest integer of two digits, 128 high + low."""


def _rounded(x: Tensor, largest: Tensor, most: int) -> Tensor:
    inverse = torch.where(largest * 3e38 > most, most / largest, 0)
    return (x * inverse).round().double() * (largest / most).double()


def largest_of_blocks(x: Tensor, joined: bool) -> Tensor:
    """max |x| that the scale of each block of x [..., K] is made from, K a multiple of UNIT if ``joined``."""
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
    """x [..., K] in float64, every block as integers of up to 127 times a scale, max |x| / 127.

    The last block of a row may be shorter. One with a number that isn't finite is NaN.

    Args:
        joined: blocks of a unit may share a scale: for weights whose groups are multiples of UNIT, or rows.

    Example:
        >>> round_blocks(torch.tensor([1.0, 0.4, 127.0])).tolist()
        [1.0, 0.0, 127.0]
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % UNIT))
    largest = largest_of_blocks(padded, joined).unsqueeze(-1)
    return _rounded(padded.unflatten(-1, (-1, BLOCK)), largest, 127).flatten(-2)[..., :columns]


def round_rows(x: Tensor, most: int = 127) -> Tensor:
    """The same with one scale a row."""
    x = x.float()
    return _rounded(x, x.abs().amax(-1, keepdim=True), most)


def round_digits(x: Tensor) -> Tensor:
    """x [..., K] in float64, rows as integers of up to 127 * 128 times a scale: two digits of a byte each.

    The kernels ``amx_bf16`` do so where they multiply many tokens with tiles, which take no scale of blocks.
    """
    return round_rows(x, DIGITS)
