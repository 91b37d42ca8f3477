"""How far quantized weights, and what is computed with them, are from what they stand for."""

import torch
from torch import Tensor

from ktops.formats.expert_weight import ExpertWeight
from ktops.formats.registry import get_format


class RelativeError:
    """``||actual - expected|| / ||expected||`` (2-norm) over tensors that come one after the other.

    Example:
        >>> error = RelativeError()
        >>> error.add(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
        >>> error.value
        0.1
    """

    def __init__(self) -> None:
        self.difference = self.norm = 0.0

    @torch.no_grad()
    def add(self, actual: Tensor, expected: Tensor) -> None:
        self.difference += float((actual - expected).square().sum(dtype=torch.float64))
        self.norm += float(expected.square().sum(dtype=torch.float64))

    @property
    def value(self) -> float:
        """0 if nothing differs; infinite if everything expected is 0."""
        if not self.difference:
            return 0.0
        return (self.difference / self.norm) ** 0.5 if self.norm else float("inf")


def decode(weight: ExpertWeight, index: int) -> Tensor:
    """The float32 weights [N, K] of one expert, by the specification of the format."""
    return get_format(weight.format).dequantize(weight.expert(index), weight.shape[-1], weight.group_size)


def relative_error(weight: ExpertWeight, dense: Tensor) -> float:
    """The :class:`RelativeError` of a weight, decoded one expert at a time.

    Args:
        weight: in any format.
        dense: the weights [E, N, K] it was made from, any floating dtype.

    Example:
        >>> dense = torch.randn(8, 64, 128)
        >>> round(relative_error(ktops.quantize(dense, "int8"), dense), 3)
        0.006
    """
    error = RelativeError()
    for expert, expected in enumerate(dense):
        error.add(decode(weight, expert), expected.float())
    return error.value
