"""APIs compatible with other systems: KTransformers' ``kt_kernel``, and the names of its usage document.

:func:`install` makes ``import kt_kernel`` import the same objects.
"""

import importlib

from ktops.compat.finder import install, uninstall
from ktops.compat.masks import generate_gpu_experts_masks
from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

_OF_THE_USAGE_DOCUMENT = (
    "MOEAMXFunction",
    "MOELayerWrapper",
    "create_lora_params",
    "get_kt_lora_params",
    "init_cpu_infer",
    "load_kt_model",
    "update_kt_lora_pointers",
    "wrap_moe_layers_with_amx",
)
"""Names of ``ktops.compat.kt_moe``, imported on first use because it needs transformers."""

__all__ = [
    "INFERENCE_METHODS",
    "SFT_METHODS",
    "KTMoEWrapper",
    "generate_gpu_experts_masks",
    "install",
    "uninstall",
    *_OF_THE_USAGE_DOCUMENT,
]


def __getattr__(name: str):
    if name in _OF_THE_USAGE_DOCUMENT:
        return getattr(importlib.import_module("ktops.compat.kt_moe"), name)
    raise AttributeError(f"module 'ktops.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
