"""Decodes weights in FP8 blocks as transformers loads them."""

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


class BlockDequantize(Fp8Dequantize):
    """transformers' decoding of FP8 blocks, extended to partial blocks at the edges of a weight.

    transformers derives the block size from the number of scales. It rejects 576 rows with 5 scales
    (DeepSeek's kv_a_proj), and mistakes 192 rows with 2 scales for blocks of 96.
    """

    def _dequantize_one(
        self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or quantized.dim() != 2 or scales.dim() != 2:
            return super()._dequantize_one(quantized, scales, output_dtype)
        shape = [-(-size // step) for size, step in zip(quantized.shape, block, strict=True)]
        if list(scales.shape) != shape:
            return super()._dequantize_one(quantized, scales, output_dtype)
        whole = quantized.new_zeros([count * step for count, step in zip(shape, block, strict=True)])
        rows, columns = quantized.shape
        whole[:rows, :columns] = quantized
        return super()._dequantize_one(whole, scales, output_dtype)[:rows, :columns].contiguous()
