"""bf16, fp16, fp32: unquantized weights, in a dtype that may differ from that of the activations."""

import torch
from torch import Tensor

from ktops.formats.format import Codes, Format


class Plain(Format):
    """Weights in a floating dtype, [..., N, K]."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def row_elements(self, columns: int) -> int:
        return columns

    def has_finite_scales(self, codes: Codes) -> bool:
        return True

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        return Codes(weight.to(self.dtype))

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        return codes.weight.float()


FORMATS = (Plain("bf16", torch.bfloat16), Plain("fp16", torch.float16), Plain("fp32", torch.float32))

PLAIN = {known.dtype: known.name for known in FORMATS}
"""dtype -> the format of weights stored in it."""
