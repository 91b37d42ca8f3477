"""The error of quantized weights, and of results computed with them."""

import torch
from torch import Tensor

from ktops.formats.expert_weight import ExpertWeight
from ktops.formats.registry import get_format


class RelativeError:
    """``||actual - expected|| / ||expected||`` (2-norm), accumulated over a sequence of tensors.

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

    def include(self, other: "RelativeError") -> None:
        """Adds what another one has accumulated."""
        self.difference += other.difference
        self.norm += other.norm

    @property
    def value(self) -> float:
        """The relative error; 0 if nothing differs, otherwise infinite if all expected values are 0."""
        if not self.difference:
            return 0.0
        return (self.difference / self.norm) ** 0.5 if self.norm else float("inf")


def decode(weight: ExpertWeight, index: int) -> Tensor:
    """Returns the float32 weights [N, K] of one expert, as the format specifies them."""
    return get_format(weight.format).dequantize(weight.expert(index), weight.shape[-1], weight.group_size)


def relative_error(weight: ExpertWeight, dense: Tensor) -> float:
    """Returns the :class:`RelativeError` of a weight, decoding one expert at a time.

    Args:
        weight: in any format.
        dense: the weights [E, N, K] it was made from, in any floating dtype.

    Example:
        >>> dense = torch.randn(8, 64, 128)
        >>> round(relative_error(ktops.quantize(dense, "int8"), dense), 3)
        0.006
    """
    error = RelativeError()
    for expert, expected in enumerate(dense):
        error.add(decode(weight, expert), expected.float())
    return error.value
