"""Measures this process and its model: peak memory, number of weights."""

import resource
import sys

import torch

from ktops.formats import ExpertWeight
from ktops.nn import Int8Linear
from ktops.nn.frozen_lora import FrozenLora, FrozenLoraLinear


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_weights(model: torch.nn.Module) -> int:
    """Returns the number of weights of a model and its adapters, whatever they are stored in."""
    return sum(parameter.numel() for parameter in model.parameters()) + sum(map(_in_buffers, model.modules()))


def _in_buffers(module: torch.nn.Module) -> int:
    """Returns the number of weights that a module holds otherwise than as parameters."""
    if isinstance(module, ExpertWeight):
        return module.shape.numel()
    if isinstance(module, Int8Linear):
        return module.qweight.numel()
    if isinstance(module, (FrozenLora, FrozenLoraLinear)):
        return sum(factor.numel() for factor in module.buffers(recurse=False))
    return 0
