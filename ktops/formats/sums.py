"""Sums in an order that does not depend on the machine, so that kernels can return the same bits."""

import torch
from torch import Tensor

SEGMENT = 16


def ordered_sum(numbers: Tensor) -> Tensor:
    """Returns the sums [..., 1] over the last dimension.

    Segments of 16 consecutive numbers are added to 0 one by one, then neighboring sums in pairs, until one is
    left.
    """
    segments = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % SEGMENT)).unflatten(
        -1, (-1, SEGMENT)
    )
    total = torch.zeros_like(segments[..., 0])
    for part in segments.unbind(-1):
        total += part
    while total.shape[-1] > 1:
        total = torch.nn.functional.pad(total, (0, total.shape[-1] % 2))
        total = total[..., 0::2] + total[..., 1::2]
    return total


def ordered_mean(numbers: Tensor) -> Tensor:
    """Returns :func:`ordered_sum` divided by the number of summands."""
    return ordered_sum(numbers) / numbers.shape[-1]
