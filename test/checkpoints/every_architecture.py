"""Builds every architecture with experts in the installed transformers as a model without weights, and its
experts under their published names."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

SIZES = {
    "num_hidden_layers": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "moe_intermediate_size": 8, "intermediate_size": 8, "expert_ffn_hidden_size": 8,
    "vision_intermediate_size": 8, "depth": 2, "num_layers": 2, "encoder_layers": 1,
}  # fmt: skip
"""Config keys of the experts' sizes and of the number of layers; all others keep their defaults."""

MORE = {
    "gemma4_text": {
        "enable_moe_block": True, "moe_intermediate_size": 8, "num_experts": 4, "top_k_experts": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "hunyuan_v1_moe": {"head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
}  # fmt: skip
"""Maps each model type to what its config needs in addition to SIZES."""

MAPPINGS = ("FOR_CAUSAL_LM_MAPPING_NAMES", "FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MAPPING_NAMES")


def architectures() -> Iterator[tuple[str, type]]:
    """Returns model type and class of all models whose module uses the experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        module = configuration_auto.model_type_to_module_name(model_type)
        code = folder / module / f"modeling_{module}.py"
        if not code.exists() or "use_experts_implementation" not in code.read_text():
            continue
        config_class = configuration_auto.CONFIG_MAPPING[model_type]
        for table in (getattr(modeling_auto, f"MODEL_{name}") for name in MAPPINGS):
            names = table.get(model_type, ())
            model_class = (
                getattr(transformers, names if isinstance(names, str) else names[0]) if names else None
            )
            if model_class is not None and model_class.config_class in (config_class, None):
                yield model_type, model_class
                break


def shrink(config) -> None:
    """Reduces the experts' sizes and the number of layers in a config and its sub-configs."""
    count = vars(config).get("num_hidden_layers")
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and count and len(value) == count > 2 and "layer_types" in key:
            setattr(config, key, value[-2:])
    for key, size in SIZES.items():
        if isinstance(vars(config).get(key), int):
            setattr(config, key, size)
    for key, value in MORE.get(config.model_type, {}).items():
        setattr(config, key, value)
    if vars(config).get("first_k_dense_replace"):
        config.first_k_dense_replace = 1
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if isinstance(part, transformers.PreTrainedConfig):
            shrink(part)


def model_without_weights(model_type: str, model_class: type) -> transformers.PreTrainedModel:
    """Returns a small model on the meta device.

    Raises:
        Exception: the config cannot be made small, or needs a library that is not installed.
    """
    config = configuration_auto.CONFIG_MAPPING[model_type]()
    shrink(config)
    with torch.device("meta"), no_init_weights():
        return model_class._from_config(config)


def stacked_experts(model) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module._parameters.get("down_proj"), "ndim", 0) == 3 and "shared" not in name
    }


def published(model, modules) -> tuple[dict, dict]:
    """Returns random expert weights under their names in the model, and as save_pretrained writes them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.{key}": torch.randn(weight.shape, generator=generator).bfloat16()
        for name, module in modules.items()
        for key, weight in module._parameters.items()
        if weight is not None
    }
    return weights, {key: t.contiguous() for key, t in revert_weight_conversion(model, weights).items()}


def expected(name: str, module, weights: dict) -> tuple:
    """Returns gate_up_proj [E, 2I, H] or up_proj [E, I, H], down_proj [E, H, I], and their biases or None."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    keys = (first, "down_proj", f"{first}_bias", "down_proj_bias")
    gate_up, down, gate_up_bias, down_bias = (weights.get(f"{name}.{key}") for key in keys)
    if getattr(module, "is_transposed", False) or re.match("Llama4", type(module).__name__):
        gate_up, down = gate_up.mT, down.mT
    return gate_up, down, gate_up_bias, down_bias
