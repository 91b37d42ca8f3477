"""What ``compute="int8"`` makes of rows of activations: of hidden_states and of h = act(g) * u.

Products of the integers are exact; they are scaled and added up in float32.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Columns that share a scale."""

DIGITS = 127 * 128
"""The largest integer of two digits, 128 high + low."""


def _rounded(x: Tensor, largest: Tensor, most: int) -> Tensor:
    inverse = torch.where(largest * 3e38 > most, most / largest, 0)
    return (x * inverse).round().double() * (largest / most).double()


def round_blocks(x: Tensor, block: int = BLOCK) -> Tensor:
    """x [..., K] in float64, every ``block`` columns as integers of up to 127 times a scale, max |x| / 127.

    The last block of a row may be shorter. That of a number that isn't finite is NaN.

    Example:
        >>> round_blocks(torch.tensor([1.0, 0.5, 127.0])).tolist()
        [1.0, 0.0, 127.0]
    """
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    return _rounded(blocks, blocks.abs().amax(-1, keepdim=True), 127).flatten(-2)[..., :columns]


def round_digits(x: Tensor) -> Tensor:
    """x [..., K] in float64, rows as integers of up to 127 * 128 times a scale: two digits of a byte each.

    The kernels ``amx_bf16`` do so where they multiply many tokens with tiles, which take no scale of blocks.
    """
    x = x.float()
    return _rounded(x, x.abs().amax(-1, keepdim=True), DIGITS)
