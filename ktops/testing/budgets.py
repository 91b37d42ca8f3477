"""How far a result may lie from float64: derived from the dtype, written once.

Errors are norm-wise, ||actual - reference||_F / ||reference||_F, against the float64 result on the same
inputs.

Rounding to a dtype of unit roundoff u (bfloat16 2^-8, float32 2^-24) is uniform in ±u times the binade, an
RMS error of u/√3 of the binade; the RMS value in a binade is at least √2 (mantissas no steeper than 1/m²).
So one rounding costs ``rms(dtype)`` = u/√6 norm-wise, independent roundings add in quadrature, and a linear
map with incoherent weights passes a relative error on unchanged. act(g)·u has two erring factors: √2.
"""

import math

import torch
from torch import Tensor

SAFETY = 2.0
"""Room above the RMS model: correlated roundings, finite samples."""


def rms(dtype: torch.dtype) -> float:
    """RMS relative error of one rounding to dtype: u/√6, u = eps/2."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(6)


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference||_F / ||reference||_F in float64; 0 where both are zero or empty, inf for NaN."""
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(reference.shape)}")
    reference = reference.detach().double()
    difference = (actual.detach().double() - reference).norm().item()
    if difference == 0:
        return 0.0
    norm = reference.norm().item()
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def forward_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Largest relative_error of the forward output for well-conditioned (random, not tiny) inputs.

    Roundings to ``dtype``: x A^T and the LoRA factors where they are kept in float32 (three, twice through
    the activation), h, the output, h A^T and the factors of down. float32 and float64 also accumulate over
    ``inner_size`` products: that many roundings of partial sums, RMS 1/√2 of the result.
    """
    roundings = 2 * 3 + 2 + 3
    accumulated = 0 if dtype == torch.bfloat16 else 3 * inner_size / 2
    return SAFETY * rms(dtype) * math.sqrt(roundings + accumulated)


def gradient_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Largest relative_error of any gradient for well-conditioned inputs: as forward, and what backward adds.

    [g | u] as saved (twice), h, d B2, dh, [dg | du] (twice), [dg | du] B1, the gradient itself.
    """
    roundings = 2 * 3 + 2 + 3 + 2 + 1 + 1 + 1 + 2 + 1 + 1
    accumulated = 0 if dtype == torch.bfloat16 else 5 * inner_size / 2
    return SAFETY * rms(dtype) * math.sqrt(roundings + accumulated)
