"""The block formats of ggml, as GGUF files store them: weight uint8 [..., N, K / block * bytes].

The blocks contain the scales. The `gguf` package defines decoding (`gguf_decode.py`), and also quantization
except for the k-quants (`k_quants.py`); the kernels do not need it.
"""

import torch
from torch import Tensor

from ktops.formats.format import Codes, Format
from ktops.formats.gguf_decode import DECODERS

BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq4_nl": (32, 18), "iq4_xs": (256, 136),
}  # fmt: skip
"""Format -> (weights, bytes) per block."""


HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
"""Format -> the offsets of the float16 numbers, d and then dmin, in a block."""

READ_ONLY = ("iq4_nl", "iq4_xs")
"""Formats that neither the gguf package nor ktops can quantize to."""


class GgufBlocks(Format):
    dtype = torch.uint8
    has_quantizer = True

    def __init__(self, name: str, block: int, block_bytes: int) -> None:
        self.name, self.block, self.block_bytes = name, block, block_bytes
        self.written = name not in READ_ONLY

    def row_elements(self, columns: int) -> int:
        if columns % self.block:
            raise ValueError(
                f"format {self.name!r} needs rows of a multiple of {self.block} weights, got {columns}: "
                "a row holds whole blocks. Use q8_0, q5_0 or q4_0 (blocks of 32), int4 or int8"
            )
        return columns // self.block * self.block_bytes

    def has_finite_scales(self, codes: Codes) -> bool:
        blocks = codes.weight.unflatten(-1, (-1, self.block_bytes))
        return all(
            bool(blocks[..., place : place + 2].contiguous().view(torch.float16).isfinite().all())
            for place in HALVES[self.name]
        )

    @property
    def scale_limit(self) -> str:
        return "scales and minima of blocks up to the largest float16, 65504"

    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        import gguf

        self.require_finite(weight)
        positive_zeros = (weight + 0).contiguous().numpy()  # for the sign of a minimum of 0
        kind = gguf.GGMLQuantizationType[self.name.upper()]
        return Codes(torch.from_numpy(gguf.quants.quantize(positive_zeros, kind)))

    def check_written(self) -> None:
        if not self.written:
            raise ValueError(
                f"format {self.name!r} can be read but not written. Convert with llama.cpp, or use "
                "q4_k (blocks of 256) or q4_0 (blocks of 32)"
            )

    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        blocks = codes.weight.reshape(-1, self.block_bytes)
        return DECODERS[self.name](blocks).view(*codes.weight.shape[:-1], columns)


FORMATS = tuple(GgufBlocks(name, *sizes) for name, sizes in BLOCKS.items() if not name.endswith("_k"))
"""All except the k-quants, which are in ``k_quants.py``."""
