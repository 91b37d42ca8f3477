"""The quantization_config of a composite model, for every part of it that can be loaded alone."""


def with_quantization(config: dict, quantization: dict) -> dict:
    """config.json with a quantization_config, also in the configurations of parts that have experts.

    A part of a composite model (a thinker, a text model) is loaded with its own part of config.json, which
    must say as well how its experts are stored.

    Example:
        >>> with_quantization({"text_config": {"num_experts": 8}}, {"quant_method": "ktops"})
        {'text_config': {'num_experts': 8, 'quantization_config': {'quant_method': 'ktops'}},
         'quantization_config': {'quant_method': 'ktops'}}
    """
    parts = {
        key: with_quantization(part, quantization)
        for key, part in config.items()
        if key.endswith("_config") and isinstance(part, dict) and _has_experts(part)
    }
    return {**config, **parts, "quantization_config": quantization}


def _has_experts(config: dict) -> bool:
    return any(
        "experts" in key or (isinstance(part, dict) and _has_experts(part)) for key, part in config.items()
    )
