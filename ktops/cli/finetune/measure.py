"""Measures this process and its model: peak memory, number of weights."""

import resource
import sys

import torch

from ktops.formats import ExpertWeight


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_weights(model: torch.nn.Module) -> int:
    """Returns the number of weights of a model, including those in weight formats."""
    quantized = (module.shape.numel() for module in model.modules() if isinstance(module, ExpertWeight))
    return sum(parameter.numel() for parameter in model.parameters()) + sum(quantized)
