"""How far a result may lie from float64: derived from the dtype, written once.

Errors are norm-wise, ||actual - reference||_F / ||reference||_F, against float64 on the same inputs.

One rounding to a dtype of unit roundoff u (bfloat16 2^-8, float32 2^-24) is an error uniform in ±u times the
binade, u/√3 RMS; values in a binade are √2 of it RMS or more (mantissas no steeper than 1/m²). So it costs
``rms(dtype)`` = u/√6 norm-wise. Independent roundings add in quadrature. What an error becomes on its way
to a result is not modeled but measured: the float64 reference is run again with every element of every
input wrong by ``rounding_level`` (``ktops.testing.compare.sensitivity``). The factors that a kernel rounds
(h, x A^T, [dg | du], ...) are as many as the inputs, so a kernel with one rounding per factor and per result
lands at about 1.0 to 1.2 of that measure, the same formula with every operation rounded at 1.5 to 2.0, and
one that rounds its running sums at 3 or more from inner sizes of 256 on (``test/ops/test_budgets.py`` shows
the first and the last).
"""

import math

import torch
from torch import Tensor

SAFETY = 2.0
"""How many times the expected error is allowed."""

FEW_SAMPLES = 4.0
"""Of n independent errors the norm spreads by 1/√(2n): so many times 1/√n is added to SAFETY."""

FLOAT_STEPS = 16
"""Roundings outside of sums in float32 and float64: the activation (exp within 2 ulp) and the products."""


def rms(dtype: torch.dtype) -> float:
    """RMS relative error of one rounding to dtype: u/√6 with u = eps/2."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(6)


def rounding_level(dtype: torch.dtype, inner_size: int) -> float:
    """Relative error of every factor of a product that stands for the roundings of a computation.

    bfloat16: one per factor; sums run in float32 and add nothing. float32 and float64: a sum of
    ``inner_size`` terms is rounded as often, at partial sums of 1/√2 of the result RMS.
    """
    if dtype == torch.bfloat16:
        return rms(dtype)
    return rms(dtype) * math.sqrt(FLOAT_STEPS + inner_size / 2)


def safety(num_errors: float) -> float:
    """How many times the expected norm the norm of ``num_errors`` independent errors may be."""
    return SAFETY + FEW_SAMPLES / math.sqrt(max(num_errors, 1))


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


def max_row_error(actual: Tensor, reference: Tensor) -> float:
    """Largest |actual - reference| over the RMS value of its row, rows along the last dimension; inf for NaN.

    Shows a single wrong element, which the norm of a large tensor hides.
    """
    if actual.numel() == 0:
        return 0.0
    reference = reference.detach().double()
    difference = (actual.detach().double() - reference).abs().amax(-1)
    scale = reference.square().mean(-1).sqrt()
    error = torch.where(difference == 0, 0.0, difference / scale).max().item()
    return error if math.isfinite(error) else math.inf


def forward_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Largest relative_error of the forward output for well-conditioned inputs: random and not tiny.

    Where running the reference several times is too slow. Roundings: x A^T and the LoRA factors kept in
    float32 (three, twice through act(g)·u), h, the output, h A^T and the factors of down.
    """
    return SAFETY * rounding_level(dtype, inner_size) * math.sqrt(2 * 3 + 2 + 3)


def gradient_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Largest relative_error of any gradient for well-conditioned inputs: as forward, and what backward adds.

    [g | u] as saved (twice), h, d B2, dh, [dg | du] (twice), [dg | du] B1, the gradient itself.
    """
    return SAFETY * rounding_level(dtype, inner_size) * math.sqrt(2 * 3 + 2 + 3 + 2 + 1 + 1 + 1 + 2 + 1 + 1)


def model_budget(dtype: torch.dtype, inner_size: int, num_operations: int) -> float:
    """Largest relative_error between two runs of a model that is ``num_operations`` layers' operations deep.

    Each operation may be wrong by what a gradient of the op may; errors of operations add in quadrature.
    """
    return math.sqrt(num_operations) * gradient_budget(dtype, inner_size)
