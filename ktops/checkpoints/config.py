"""What config.json says of a directory whose experts ktops has written.

``quantization_config`` is ``{"loader": "ktops"}``, and ``"other"`` in it is what the source said, where the
tensors that are not experts' are quantized too. There is no ``quant_method`` in it: transformers skips a
method that it does not know, and would make the experts anew at random; without any it refuses to load the
model. After ktops.enable() it takes ktops' loader.
"""

from collections.abc import Mapping

import torch

from ktops.checkpoints.view import View

LOADER = "ktops"

SCALES = ("weight_scale_inv", "weight_scale", "weight_packed", "qweight", "qzeros", "scales", "absmax", "SCB")
"""How names of tensors end that a quantizer wrote beside, or in place of, a weight."""

QUANTIZED = (*SCALES, "scale", "scale_inv", "zero_point", "blocks")
"""The same with those that some models have without any quantizer."""

CODES = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu}


def is_ktops(quantization) -> bool:
    """Whether a quantization_config of config.json is ktops' own."""
    return isinstance(quantization, Mapping) and LOADER in (
        quantization.get("loader"),
        quantization.get("quant_method"),
    )


def quantization_of(config: Mapping) -> Mapping | None:
    """The quantization_config of a config.json, or else of a part of it."""
    own = config.get("quantization_config")
    return own or next(filter(None, map(quantization_of, _parts(config).values())), None)


def needs_quantizer(tensors: Mapping[str, View]) -> bool:
    """Whether another library's quantizer is needed to read these tensors, by name."""
    return any(name.endswith(QUANTIZED) or view.dtype in CODES for name, view in tensors.items())


def converted_config(config: dict, other_tensors: Mapping[str, View]) -> dict:
    """The config.json of a directory with the experts in ktops' layout and the other tensors as they are.

    Args:
        config: that of the source, which may be such a directory too.
        other_tensors: those that are not experts', by name.

    Example:
        >>> converted_config({"model_type": "qwen3_moe"}, {})
        {'model_type': 'qwen3_moe', 'quantization_config': {'loader': 'ktops'}}
    """
    found = quantization_of(config)
    if is_ktops(found):
        found = found.get("other")
    other = {"other": found} if found and needs_quantizer(other_tensors) else {}
    return _with_quantization(config, {"loader": LOADER, **other})


def _parts(config: Mapping) -> dict[str, Mapping]:
    """The configurations of the parts of a composite model by key."""
    return {
        key: part
        for key, part in config.items()
        if key.endswith("_config") and key != "quantization_config" and isinstance(part, Mapping)
    }


def _with_quantization(config: Mapping, quantization: dict, *, whole: bool = True) -> dict:
    """config.json with a quantization_config, in the parts that have experts too and in no others.

    A part of a composite model (a thinker, a text model) is loaded with its own part of config.json, which
    must say as well how its experts are stored.
    """
    parts = {key: _with_quantization(part, quantization, whole=False) for key, part in _parts(config).items()}
    made = {key: value for key, value in config.items() if key != "quantization_config"} | parts
    return made | {"quantization_config": quantization} if whole or _has_experts(config) else made


def _has_experts(config: Mapping) -> bool:
    return any("experts" in key for key in config) or any(map(_has_experts, _parts(config).values()))
