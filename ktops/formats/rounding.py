"""Rounding to integers, and the scales that searches try."""

import torch
from torch import Tensor


def divide(weight: Tensor, scale: Tensor) -> Tensor:
    """Returns weight / scale, and 0 where the scale is 0."""
    return weight / torch.where(scale == 0, torch.inf, scale)


def round_to(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Returns the integers in [low, high] nearest to weight / scale, and 0 where the scale is 0."""
    return divide(weight, scale).round_().clamp_(low, high)


def shrinking(steps: int, smallest: float) -> list[float]:
    return [1 - step * (1 - smallest) / steps for step in range(steps)]
