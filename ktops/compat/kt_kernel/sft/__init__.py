"""The names of KTransformers' module ``kt_kernel.sft``, with which its fork of LLaMA-Factory trains.

They are imported on first use, because servers import ``kt_kernel`` without training anything.
"""

import importlib

_NAMES = {
    "adaptation": (
        "KTAdaptationResult",
        "adapt_peft_lora",
        "get_kt_lora_named_params",
        "get_kt_lora_params",
        "get_kt_named_trainable_params",
        "get_kt_rank_local_parameter_names",
        "get_kt_trainable_params",
        "kt_adapt_peft_lora",
        "sync_kt_lora_gradients",
        "update_kt_lora_pointers",
    ),
    "adapter_files": (
        "FUSED_EXPERT_LORA_NAME",
        "KTAdapterManifest",
        "KTArtifactError",
        "KT_ADAPTER_MANIFEST_NAME",
        "load_kt_adapter_artifacts",
        "load_kt_moe_from_adapter",
        "save_kt_adapter_artifacts",
        "save_kt_moe_to_adapter",
    ),
    "amx": ("AMXSFTMoEWrapper",),
    "arch": (
        "KTAMXConfigError",
        "KTAMXError",
        "KTAMXModelNotSupportedError",
        "KTAMXNotAvailableError",
        "MOEArchConfig",
        "get_expert_device",
        "get_moe_arch_config",
        "get_moe_module",
        "move_non_experts_to_gpu",
    ),
    "artifacts": (
        "KTNonExpertCache",
        "KTPretrainedLoadPlan",
        "KT_NON_EXPERT_MANIFEST_NAME",
        "claim_kt_routed_expert_subtrees",
        "get_kt_fused_lora_exclude_modules",
        "hide_kt_int8_routed_experts_from_dispatch",
        "hide_kt_routed_experts_from_dispatch",
        "is_kt_int8_routed_expert_base_parameter",
        "is_kt_routed_expert_base_parameter",
        "is_kt_routed_expert_parameter_name",
        "is_kt_supported_moe_model",
        "mark_kt_int8_routed_expert_base_parameters",
        "prepare_kt_int8_non_expert_device_map",
        "prepare_kt_non_expert_device_map",
        "project_kt_int8_routed_experts_out_of_device_map",
        "project_kt_routed_experts_out_of_device_map",
        "resolve_kt_pretrained_artifacts",
        "should_disable_kt_source_quantizer",
        "validate_kt_prequantized_loading_info",
        "validate_kt_pretrained_load",
        "write_kt_non_expert_cache_manifest",
    ),
    "autograd": ("KTMoEFunction",),
    "backend": (
        "FP8_BACKEND",
        "FP8_SFT_METHOD",
        "INT8_BACKEND",
        "INT8_SFT_METHOD",
        "MXFP4_SFT_METHOD",
        "RAWINT4_BACKEND",
        "RAWINT4_GROUP_SIZE",
        "RAWINT4_SFT_METHOD",
        "RAWINT4_WEIGHT_LAYOUT",
        "get_fp8_runtime",
        "get_int8_runtime",
        "get_mxfp4_runtime",
        "get_rawint4_checkpoint_contract",
        "get_rawint4_runtime",
    ),
    "base": ("BaseSFTMoEWrapper", "KExpertsSFTBuffer"),
    "config": ("KTActivationPolicy", "KTConfig"),
    "conv3d_compat": ("is_vlm_conv3d_compatible", "patch_vlm_conv3d"),
    "dist_utils": ("get_activation_checkpoint_context_fn",),
    "layer": ("KTMoELayerWrapper",),
    "profiler": ("collect_kt_sft_profile", "format_kt_sft_profile", "reset_kt_sft_profile"),
    "unsupported": (
        "BlockFP8ExpertWeights",
        "INT8ExpertWeights",
        "LoRAExpertMLP",
        "LoRAExperts",
        "RAWINT4ExpertWeights",
        "load_block_fp8_experts_from_checkpoint_files",
        "load_experts_from_kt_weight_path",
        "load_lora_experts_from_adapter",
        "load_rawint4_experts_from_checkpoint_files",
        "save_lora_experts_to_adapter",
        "validate_persistent_int8_weights",
    ),
    "weights": ("extract_moe_weights", "get_kt_expert_placeholders", "load_experts_from_checkpoint_files"),
    "wrapper": (
        "build_kt_device_map",
        "build_kt_device_map_simplified",
        "get_kt_loading_kwargs",
        "load_kt_model",
        "wrap_moe_layers_with_kt_wrapper",
    ),
}
"""Module -> what is imported from it."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
