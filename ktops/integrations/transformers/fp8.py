"""Decodes weights in FP8 blocks as transformers loads them."""

from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


def with_partial_blocks(conversions: list) -> list:
    """Replaces transformers' decoding in conversions with a :class:`BlockDequantize`."""
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        operations[:] = [
            BlockDequantize(each.hf_quantizer) if type(each) is Fp8Dequantize else each for each in operations
        ]
    return conversions


class BlockDequantize(Fp8Dequantize):
    """transformers' decoding of FP8 blocks, extended to partial blocks at the edges of a weight.

    transformers derives the block size from the number of scales. It rejects 576 rows with 5 scales
    (DeepSeek's kv_a_proj), and mistakes 192 rows with 2 scales for blocks of 96.
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, **dtype) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or quantized.dim() != 2 or scales.dim() != 2:
            return super()._dequantize_one(quantized, scales, **dtype)
        shape = [-(-size // step) for size, step in zip(quantized.shape, block, strict=True)]
        if list(scales.shape) != shape:
            return super()._dequantize_one(quantized, scales, **dtype)
        whole = quantized.new_zeros([count * step for count, step in zip(shape, block, strict=True)])
        rows, columns = quantized.shape
        whole[:rows, :columns] = quantized
        return super()._dequantize_one(whole, scales, **dtype)[:rows, :columns].contiguous()
