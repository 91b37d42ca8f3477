"""The quantizer of all tensors except the experts: transformers' own for the method, or none."""

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

    If it can, the quantizer decodes the weights while loading them, so that they can be used on the CPU.

    Raises:
        ValueError, ImportError, RuntimeError: transformers does not know the method, or it needs a library.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    if hasattr(config, "dequantize"):
        config.dequantize = True
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    if decodes_fp8(quantizer) and not hasattr(HfQuantizer, "update_weight_conversions"):
        raise ImportError("decoding weights in FP8 needs transformers>=5.8: pip install -U transformers")
    return quantizer


def decodes_fp8(quantizer: HfQuantizer) -> bool:
    """True if the quantizer decodes weights in FP8 blocks."""
    return isinstance(quantizer, FineGrainedFP8HfQuantizer)
