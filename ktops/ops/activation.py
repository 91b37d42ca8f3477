"""Gate activations and their derivatives."""

import math

import torch
from torch import Tensor


def _sigmoid_grad(s: Tensor) -> Tensor:
    return s * (1 - s)


def silu(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·σ(g)"""
    s = torch.sigmoid(g)
    return g * s, s + g * _sigmoid_grad(s)


def gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·Φ(g), with Φ the standard normal CDF"""
    cdf = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    pdf = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    return g * cdf, cdf + g * pdf


def gelu_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·σ(2z) = 0.5 g (1 + tanh z), with z = √(2/π)(g + 0.044715 g³)"""
    c = math.sqrt(2 / math.pi)
    s = torch.sigmoid(2 * c * (g + 0.044715 * g**3))
    return g * s, s + g * _sigmoid_grad(s) * 2 * c * (1 + 3 * 0.044715 * g * g)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
"""Maps each name to a function from g to (act(g), act'(g))."""
