"""Error budgets: how far a result may be from float64, derived from the dtype.

Errors are norm-wise, ||actual - reference||_F / ||reference||_F, relative to float64 on the same inputs.

One rounding to a dtype of unit roundoff u (bfloat16 2^-8, float32 2^-24) is an error uniform in ±u times the
binade, u/√3 RMS; values in a binade are √2 of it RMS or more (mantissas no steeper than 1/m²). So it costs
``rms(dtype)`` = u/√6 norm-wise. Independent roundings add in quadrature. How an error propagates to a result
is not modeled but measured, by running the float64 reference again with every element of every input
perturbed by ``rounding_level`` (``ktops.testing.compare.sensitivity``). A kernel rounds as many factors (h, x
A^T, [dg | du], ...) as there are inputs. A kernel with one rounding per factor and per result therefore
reaches about 1.0 to 1.2 times that measure, the same formula with every operation rounded 1.5 to 2.0, and a
kernel that rounds its running sums 3 or more for inner sizes of 256 and up (``test/ops/test_budgets.py``
shows the first and the last).
"""

import math

import torch
from torch import Tensor

SAFETY = 2.0
"""The allowed error as a multiple of the expected one."""

FEW_SAMPLES = 4.0
"""The norm of n independent errors spreads by 1/√(2n), so this many times 1/√n is added to SAFETY."""

FLOAT_STEPS = 16
"""Roundings outside sums in float32 and float64: the activation (exp within 2 ulp) and the products."""


def rms(dtype: torch.dtype) -> float:
    """Returns the RMS relative error of one rounding to dtype, u/√6 with u = eps/2."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(6)


def smallest_error(dtype: torch.dtype) -> float:
    """Returns the RMS error of rounding a number that is subnormal in dtype: uniform in ± half a step.

    Only float16, with steps of 2^-24, has so few exponent bits that it matters.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / math.sqrt(12)


def rounding_level(dtype: torch.dtype, inner_size: int) -> float:
    """Returns the relative error of every factor of a product that models the roundings of a computation.

    In bfloat16 and float16, every factor is rounded once; sums run in float32 and add nothing. In float32 and
    float64, a sum of ``inner_size`` terms is rounded that many times, at partial sums of 1/√2 of the result
    RMS.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return rms(dtype)
    return rms(dtype) * math.sqrt(FLOAT_STEPS + inner_size / 2)


def safety(num_errors: float) -> float:
    """Returns the allowed norm of ``num_errors`` independent errors as a multiple of the expected norm."""
    return SAFETY + FEW_SAMPLES / math.sqrt(max(num_errors, 1))


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Returns ||actual - reference||_F / ||reference||_F in float64; 0 if both are zero; inf for NaN."""
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(reference.shape)}")
    reference = reference.detach().double()
    difference = (actual.detach().double() - reference).norm().item()
    if difference == 0:
        return 0.0
    norm = reference.norm().item()
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def max_row_error(actual: Tensor, reference: Tensor) -> float:
    """Returns the largest |actual - reference| divided by the RMS of its row (last dimension); inf for NaN.

    Reveals a single wrong element, which the norm of a large tensor hides.
    """
    if actual.numel() == 0:
        return 0.0
    reference = reference.detach().double()
    difference = (actual.detach().double() - reference).abs().amax(-1)
    scale = reference.square().mean(-1).sqrt()
    error = torch.where(difference == 0, 0.0, difference / scale).max().item()
    return error if math.isfinite(error) else math.inf


def forward_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Returns the largest relative_error of the output for well-conditioned inputs (random and not tiny).

    For use when running the reference several times is too slow. The roundings are x A^T and the LoRA factors
    kept in float32 (three, twice through act(g)·u), h, the output, h A^T and the factors of down.
    """
    return SAFETY * rounding_level(dtype, inner_size) * math.sqrt(2 * 3 + 2 + 3)


def gradient_budget(dtype: torch.dtype, inner_size: int = 2048) -> float:
    """Returns the largest relative_error of any gradient for well-conditioned inputs.

    Backward adds these roundings to those of forward: [g | u] as saved (twice), h, d B2, dh, [dg | du]
    (twice), [dg | du] B1, the gradient itself.
    """
    return SAFETY * rounding_level(dtype, inner_size) * math.sqrt(2 * 3 + 2 + 3 + 2 + 1 + 1 + 1 + 2 + 1 + 1)


def model_budget(dtype: torch.dtype, inner_size: int, num_operations: int) -> float:
    """Returns the largest relative_error between two runs of a model with a depth of ``num_operations``.

    Each operation may have the error allowed for a gradient of the op; errors of operations add in
    quadrature.
    """
    return math.sqrt(num_operations) * gradient_budget(dtype, inner_size)
