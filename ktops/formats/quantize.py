"""quantize and dequantize, which convert between dense weights and :class:`ExpertWeight`."""

import torch
from torch import Tensor

from ktops.formats.expert_weight import COMPUTE_DTYPES, ExpertWeight
from ktops.formats.format import stacked
from ktops.formats.registry import get_format


@torch.no_grad()
def quantize(
    weight: Tensor, format: str, *, group_size: int | None = None, method: str = "rtn"
) -> ExpertWeight:
    """Quantizes dense weights to a weight format, expert by expert.

    Args:
        weight: [E, N, K], any floating-point dtype, on the CPU.
        format: one of ``ktops.formats.names(written=True)``.
        group_size: number of columns that share a scale; 0 means one scale per row. Default: 128 for int4
            and uint4, 32 for mxfp4 and mxfp8, 128 x 128 blocks for fp8_e4m3, otherwise 0.
        method: "rtn" rounds to nearest with the scale that covers the largest weight; "mse" (int8, int4,
            uint4, k-quants) searches for the scale, of either sign, and the zero point with the least squared
            error; "hqq" (uint4) is half-quadratic quantization (Badri and Shaji, 2023), which minimizes
            sum |error|^0.7 over the zero point. With "mse" and "hqq", zero points of uint4 are float16, not
            integers.

    Returns:
        The weights as an :class:`ExpertWeight` that computes in weight.dtype.

    Raises:
        ValueError: unknown format, or one that cannot be written, does not support the group size or the
            method, or cannot hold rows of K columns, weights of that size, or NaN and infinity.
        TypeError: weight does not have a floating-point dtype.

    Example:
        >>> weight = ktops.quantize(torch.randn(8, 64, 128), "int4", group_size=32)
        >>> weight.nbytes / (8 * 64 * 128)
        0.5625
    """
    if weight.dim() != 3:
        raise ValueError(f"quantize: weight must have shape [E, N, K], got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"quantize: weight must have a floating-point dtype, got {weight.dtype}")
    if not len(weight):
        raise ValueError(f"quantize: weight must have at least one expert, got shape {list(weight.shape)}")
    try:
        known = get_format(format)
        group_size = known.check_quantizable(weight.shape[-1], group_size, method)
        experts = (known.quantize(expert, group_size, method) for expert in weight)
        codes = stacked(experts, len(weight))
    except ValueError as error:
        raise ValueError(f"quantize: {error}") from None
    dtype = weight.dtype if weight.dtype in COMPUTE_DTYPES else torch.bfloat16
    return ExpertWeight(format, weight.shape, *codes, group_size=group_size, dtype=dtype)


def dequantize(weight: ExpertWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense weights [E, N, K] of an :class:`ExpertWeight`, as its kernels decode them.

    Args:
        weight: the weights, in any format.
        dtype: of the result. Default: weight.dtype. float32 values match the format's definition bit for bit;
            other dtypes are converted from float32.

    Example:
        >>> weight = ktops.quantize(torch.randn(8, 64, 128), "int8")
        >>> ktops.dequantize(weight).shape
        torch.Size([8, 64, 128])
    """
    return weight.dequantize(dtype)
