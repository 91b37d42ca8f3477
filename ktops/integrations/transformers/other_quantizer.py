"""The quantizer of all tensors except the experts: transformers' own for the method, or none."""

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


class PlainQuantizer(HfQuantizer):
    """Does nothing, for weights that are not quantized."""

    def preprocess_model(self, model, **kwargs) -> None:
        pass

    def postprocess_model(self, model, **kwargs):
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def other_quantizer(config) -> HfQuantizer:
    """Returns transformers' quantizer for a quantization_config, the dict from config.json or an object.

    If it can, the quantizer decodes the weights while loading them, because they are used on the CPU.

    Raises:
        ValueError, ImportError, RuntimeError: transformers does not know the method, or it needs a library.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    if hasattr(config, "dequantize"):
        config.dequantize = True
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    if isinstance(quantizer, FineGrainedFP8HfQuantizer):
        quantizer.get_load_operations = lambda: {"dequantize": BlockDequantize}
    return quantizer


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
