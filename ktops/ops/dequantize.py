"""kt::dequantize: decodes weights in a format to float32."""

import torch
from torch import Tensor


@torch.library.register_fake("kt::dequantize")
def _fake(
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    weight_format: str,
    group_size: int,
    columns: int,
) -> Tensor:
    return weight.new_empty(*weight.shape[:2], columns, dtype=torch.float32)


def _backward(ctx, grad):
    raise RuntimeError("kt::dequantize has no gradient: codes are not differentiable")


torch.library.register_autograd("kt::dequantize", _backward)
