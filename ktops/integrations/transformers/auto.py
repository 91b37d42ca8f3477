"""Registers ktops' loader with transformers, which selects a model's quantizer by its config."""

import copy

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)

from ktops.checkpoints.config import is_ktops
from ktops.integrations.replacements import Replacements
from ktops.integrations.transformers.config import NAME, KTConfig
from ktops.integrations.transformers.quantizer import KTQuantizer

_replaced = Replacements()


def enable() -> None:
    """Registers ktops' loader with transformers; a second call does nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = KTConfig
    AUTO_QUANTIZER_MAPPING[NAME] = KTQuantizer
    if not _replaced:
        _replaced.install(
            AutoHfQuantizer,
            supports_quant_method=staticmethod(_supports),
            merge_quantization_configs=staticmethod(_merge),
        )


def disable() -> None:
    """Unregisters ktops' loader."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(NAME, None)
    AUTO_QUANTIZER_MAPPING.pop(NAME, None)
    _replaced.restore()


def _supports(quantization) -> bool:
    """``AutoHfQuantizer.supports_quant_method``, which otherwise rejects a config without quant_method."""
    return (
        is_ktops(quantization)
        or isinstance(quantization, KTConfig)
        or _replaced.original["supports_quant_method"](quantization)
    )


def _merge(quantization, given):
    """``AutoHfQuantizer.merge_quantization_configs``, where either config may be ktops'.

    Args:
        quantization: the model's quantization config, from config.json or an object.
        given: the argument of from_pretrained, or None.
    """
    ours = is_ktops(quantization) or isinstance(quantization, KTConfig)
    if not ours and not isinstance(given, KTConfig):
        return _replaced.original["merge_quantization_configs"](quantization, given)
    if not ours:
        stored = KTConfig(other=quantization)
    elif isinstance(quantization, KTConfig):
        stored = copy.copy(quantization)
    else:
        stored = KTConfig.from_dict(quantization)
    if isinstance(given, KTConfig):
        return _with_arguments(stored, given)
    if given is not None:
        if stored.other is None:
            raise ValueError(
                "from_pretrained: quantization_config must be a KTConfig for a model with only the experts "
                f"quantized, got a {type(given).__name__}"
            )
        stored.other = _replaced.original["merge_quantization_configs"](stored.other, given)
    return stored


def _with_arguments(stored: KTConfig, given: KTConfig) -> KTConfig:
    """Returns the config stored with a model, overridden by the one passed to from_pretrained."""
    merged = copy.copy(given)
    if given.weight_format is None:
        for name in ("weight_format", "group_size", "method"):
            setattr(merged, name, getattr(stored, name))
    if stored.other is not None:
        merged.other = stored.other
        if given.other is not None:
            merged.other = _replaced.original["merge_quantization_configs"](stored.other, given.other)
    return merged
