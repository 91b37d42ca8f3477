"""The quantization_config that ktops writes to the config.json of a directory with experts in its formats.

It is ``{"loader": "ktops"}``, plus ``"other"`` with the source's own quantization_config if the other tensors
are quantized too. It deliberately has no ``quant_method``. transformers ignores unknown methods and would
initialize the experts at random, but it rejects a config without one. After ``ktops.enable()`` it uses ktops'
loader.
"""

from collections.abc import Mapping
from typing import TypeGuard

import torch

from ktops.checkpoints.quantization_config import sub_configs
from ktops.checkpoints.view import View

LOADER = "ktops"

FROM_QUANTIZER = (
    "weight_scale_inv", "weight_scale", "weight_packed", "qweight", "qzeros", "scales", "absmax", "SCB",
)  # fmt: skip
"""Suffixes of the tensors that a quantizer writes in addition to a weight, or in place of it."""

MAYBE_FROM_QUANTIZER = (*FROM_QUANTIZER, "scale", "scale_inv", "zero_point", "blocks")
"""FROM_QUANTIZER, plus suffixes that models can have without a quantizer."""

CODE_DTYPES = {
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
}


def is_ktops(quantization) -> TypeGuard[Mapping]:
    """True if a quantization_config is ktops' own; older ones use quant_method."""
    return isinstance(quantization, Mapping) and LOADER in (
        quantization.get("loader"),
        quantization.get("quant_method"),
    )


def quantization_of(config: Mapping) -> Mapping | None:
    """Returns the quantization_config of a config.json, or of one of its sub-configs."""
    own = config.get("quantization_config")
    return own or next(filter(None, map(quantization_of, sub_configs(config).values())), None)


def needs_quantizer(tensors: Mapping[str, View]) -> bool:
    """True if these tensors, by name, need another library's quantizer."""
    return any(
        name.endswith(MAYBE_FROM_QUANTIZER) or view.dtype in CODE_DTYPES for name, view in tensors.items()
    )


def converted_config(config: dict, other_tensors: Mapping[str, View]) -> dict:
    """Returns the config.json for a directory with experts in ktops' layout and unchanged other tensors.

    Args:
        config: the source's config.json; the source may itself be such a directory.
        other_tensors: all tensors except the experts, by name.

    Example:
        >>> converted_config({"model_type": "qwen3_moe"}, {})
        {'model_type': 'qwen3_moe', 'quantization_config': {'loader': 'ktops'}}
    """
    found = quantization_of(config)
    if is_ktops(found):
        found = found.get("other")
    other = {"other": found} if found and needs_quantizer(other_tensors) else {}
    return _with_quantization(config, {"loader": LOADER, **other})


def _with_quantization(config: Mapping, quantization: dict, *, whole: bool = True) -> dict:
    """Returns the config with this quantization_config, also in every sub-config with experts but no other.

    A part of a composite model (a thinker, a text model) can be loaded alone with only its own sub-config,
    which must then specify how its experts are stored.
    """
    parts = {
        key: _with_quantization(part, quantization, whole=False) for key, part in sub_configs(config).items()
    }
    made = {key: value for key, value in config.items() if key != "quantization_config"} | parts
    return made | {"quantization_config": quantization} if whole or _has_experts(config) else made


def _has_experts(config: Mapping) -> bool:
    return any("experts" in key for key in config) or any(map(_has_experts, sub_configs(config).values()))
