"""APIs compatible with other systems: KTransformers' ``kt_kernel``, and the names of its usage document.

:func:`install` makes ``import kt_kernel`` import the same objects.
"""

from ktops.compat.finder import install, uninstall
from ktops.compat.kt_moe import (
    MOEAMXFunction,
    MOELayerWrapper,
    create_lora_params,
    get_kt_lora_params,
    init_cpu_infer,
    load_kt_model,
    update_kt_lora_pointers,
    wrap_moe_layers_with_amx,
)
from ktops.compat.masks import generate_gpu_experts_masks
from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

__all__ = [
    "INFERENCE_METHODS",
    "SFT_METHODS",
    "KTMoEWrapper",
    "MOEAMXFunction",
    "MOELayerWrapper",
    "create_lora_params",
    "generate_gpu_experts_masks",
    "get_kt_lora_params",
    "init_cpu_infer",
    "install",
    "load_kt_model",
    "uninstall",
    "update_kt_lora_pointers",
    "wrap_moe_layers_with_amx",
]
