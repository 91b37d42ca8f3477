"""kt::quantize: quantizes weights to a format."""

import torch
from torch import Tensor

from ktops.formats import get_format
from ktops.formats.format import scale_dtype


@torch.library.register_fake("kt::quantize")
def _fake(
    weight: Tensor, weight_format: str, group_size: int, method: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    known, (num_experts, rows, columns) = get_format(weight_format), weight.shape
    codes = weight.new_empty(num_experts, rows, known.row_elements(columns), dtype=known.dtype)
    if not known.has_scale:
        return codes, None, None
    shape = num_experts, *known.scale_shape(rows, columns, group_size)
    of_groups = scale_dtype(group_size) if weight_format in ("int8", "int4", "uint4") else torch.float32
    scale = weight.new_empty(shape, dtype=torch.uint8 if weight_format.startswith("mx") else of_groups)
    zero = weight.new_empty(shape, dtype=torch.uint8 if method == "rtn" else torch.float16)
    return codes, scale, zero if known.has_zero else None


def _backward(ctx, *grads):
    raise RuntimeError("kt::quantize has no gradient: codes are not differentiable")


torch.library.register_autograd("kt::quantize", _backward)
