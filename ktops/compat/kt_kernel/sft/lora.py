"""The names of KTransformers' module ``kt_kernel.sft.lora``: adapters on the experts of a wrapped model."""

from ktops.compat.kt_kernel.sft.adaptation import (
    KTAdaptationResult,
    adapt_peft_lora,
    get_kt_lora_named_params,
    get_kt_lora_params,
    get_kt_named_trainable_params,
    get_kt_rank_local_parameter_names,
    get_kt_trainable_params,
    kt_adapt_peft_lora,
    sync_kt_lora_gradients,
    update_kt_lora_pointers,
)
from ktops.compat.kt_kernel.sft.adapter_files import load_kt_moe_from_adapter, save_kt_moe_to_adapter
from ktops.compat.kt_kernel.sft.unsupported import (
    LoRAExpertMLP,
    LoRAExperts,
    load_lora_experts_from_adapter,
    save_lora_experts_to_adapter,
)

__all__ = [
    "KTAdaptationResult",
    "LoRAExpertMLP",
    "LoRAExperts",
    "adapt_peft_lora",
    "get_kt_lora_named_params",
    "get_kt_lora_params",
    "get_kt_named_trainable_params",
    "get_kt_rank_local_parameter_names",
    "get_kt_trainable_params",
    "kt_adapt_peft_lora",
    "load_kt_moe_from_adapter",
    "load_lora_experts_from_adapter",
    "save_kt_moe_to_adapter",
    "save_lora_experts_to_adapter",
    "sync_kt_lora_gradients",
    "update_kt_lora_pointers",
]
