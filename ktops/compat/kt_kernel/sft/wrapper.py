"""The names of KTransformers' module ``kt_kernel.sft.wrapper``: loading models and wrapping their layers."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ktops
from ktops._warn import warn_once
from ktops.compat.kt_kernel.sft.arch import KTAMXConfigError, MOEArchConfig, get_moe_arch_config
from ktops.compat.kt_kernel.sft.artifacts import end_load, is_placeholder
from ktops.compat.kt_kernel.sft.config import KTConfig
from ktops.compat.kt_kernel.sft.dist_utils import RETAINING, require_one_process
from ktops.compat.kt_kernel.sft.layer import KTMoELayerWrapper
from ktops.compat.sft import SFTWrapper
from ktops.compat.wrapping import kt_value, load_model, settings_of, warn_without_amx, wrap_layers
from ktops.integrations.settings import Settings

logger = logging.getLogger(__name__)

SET_BY_CLIENTS = ("kt_model_max_length", "kt_share_cache_pool", "kt_skip_expert_loading")
"""Fields without effect that KTransformers' fork of LLaMA-Factory sets itself."""


def wrap_moe_layers_with_kt_wrapper(model: nn.Module, kt_plugin: Any) -> list[KTMoELayerWrapper]:
    """Replaces a model's MoE blocks, in place; the experts then run through the op, without adapters yet.

    Args:
        model: on the CPU.
        kt_plugin: a :class:`KTConfig`, or what :meth:`KTConfig.from_object` takes.

    Returns:
        The wrappers in the order of the layers, which are also ``model._kt_wrappers``.

    Raises:
        TypeError, ValueError: a setting is unknown, wrong or not supported.
        KTAMXModelNotSupportedError: kt_kernel does not know the architecture.
        KTAMXConfigError: several processes; weights in a format that are to be trained themselves; or the
            model has been wrapped before.
        ktops.checkpoints.CheckpointError: the checkpoint with the experts cannot be read.
    """
    config = KTConfig.from_object(kt_plugin)
    require_one_process()
    _require_trainable(config)
    warn_without_amx(config.kt_backend)
    rank, alpha = config.kt_lora_rank or 1, config.kt_lora_alpha or 1.0

    def make(
        block: nn.Module, backend: SFTWrapper, moe_config: MOEArchConfig, layer_idx: int
    ) -> KTMoELayerWrapper:
        return KTMoELayerWrapper(block, backend, None, moe_config, backend.hidden_size, layer_idx)

    settings = _loaded(model, config)
    wrappers = wrap_layers(model, settings, make, lora_rank=rank, lora_alpha=alpha)
    for wrapper in wrappers:
        wrapper.config = config
    if config.activation_policy.cpu == "retain":
        RETAINING.update(wrappers)
    return wrappers


def _require_trainable(config: KTConfig) -> None:
    if config.trains_weights and config.settings().quantization_config() is not None:
        raise KTAMXConfigError(
            f"kt_train_mode {config.kt_train_mode} trains the experts' own weights, as the model has them: "
            "leave kt_backend, kt_expert_weight_format and kt_weight_path out"
        )


def _loaded(model: nn.Module, config: KTConfig) -> Settings:
    """Loads the experts that transformers has left out; returns what is left to do."""
    end_load()
    settings = config.settings()
    ignored = [name for name in settings.without_effect if name not in SET_BY_CLIENTS]
    if ignored:
        warn_once(f"kt_kernel: {', '.join(ignored)} have no effect in ktops")
    if not any(map(is_placeholder, model.parameters())):
        return settings
    files = config.kt_checkpoint_files
    if not files:
        raise KTAMXConfigError("kt_checkpoint_files must name the checkpoint of experts that are not loaded")
    wanted = settings.quantization_config() or ktops.KTConfig()
    path = wanted.experts_path or Path(files[0]).parent
    report = ktops.load_experts(model, path, wanted.weight_format, group_size=wanted.group_size)
    logger.info("ktops: %s", report)
    return dataclasses.replace(settings, weight_path=None)


def build_kt_device_map(config, kt_plugin: Any, device: str | int = "cuda:0") -> dict[str, str | int]:
    """Returns a device_map with an entry for every expert: the first kt_num_gpu_experts on the device, the
    others on the CPU.

    The keys suit models whose experts are a ModuleList. Stacked experts cannot be divided: for them, use
    :func:`build_kt_device_map_simplified`.
    """
    moe_config = get_moe_arch_config(config)
    on_device = kt_value(kt_plugin, "kt_num_gpu_experts") or 0
    device_map, layers = _layers(config, device)
    for layer in layers:
        experts = f"{layer}.{moe_config.moe_layer_attr}.{moe_config.experts_attr}"
        for expert in range(moe_config.expert_num):
            device_map[f"{experts}.{expert}"] = device if expert < on_device else "cpu"
    return device_map


def build_kt_device_map_simplified(
    config, kt_plugin: Any, device: str | int = "cuda:0"
) -> dict[str, str | int]:
    """Returns a device_map with everything on a device but the experts, which are on the CPU.

    With kt_num_gpu_experts, it is that of :func:`build_kt_device_map`.
    """
    if kt_value(kt_plugin, "kt_num_gpu_experts"):
        return build_kt_device_map(config, kt_plugin, device)
    moe_config = get_moe_arch_config(config)
    device_map, layers = _layers(config, device)
    for layer in layers:
        device_map[f"{layer}.{moe_config.moe_layer_attr}.{moe_config.experts_attr}"] = "cpu"
    return device_map


def _layers(config, device: str | int) -> tuple[dict[str, str | int], list[str]]:
    """Returns a device_map of everything, layer by layer, and the names of the layers."""
    text = getattr(config, "text_config", None)
    model = "model" if text is None else "model.language_model"
    layers = [f"{model}.layers.{index}" for index in range((text or config).num_hidden_layers)]
    names = [f"{model}.embed_tokens", f"{model}.norm", "lm_head", *layers]
    return dict.fromkeys(names, device), layers


def get_kt_loading_kwargs(
    config,
    kt_plugin: Any,
    torch_dtype: torch.dtype | str | None = torch.bfloat16,
    trust_remote_code: bool | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Returns the keyword arguments with which ``from_pretrained`` loads a model for wrapping, on the CPU.

    They include the ``quantization_config`` that loads the experts in the format of kt_backend or from
    kt_weight_path.
    """
    given = {"trust_remote_code": trust_remote_code, "token": token}
    quantization = settings_of(kt_plugin).quantization_config(getattr(config, "quantization_config", None))
    given["quantization_config"] = quantization
    kwargs = {"config": config, "dtype": torch_dtype, "device_map": "cpu"}
    return kwargs | {name: value for name, value in given.items() if value is not None}


def load_kt_model(
    config,
    model_args: Any = None,
    finetuning_args: Any = None,
    kt_plugin: Any = None,
    model_name_or_path: str | None = None,
    trust_remote_code: bool | None = None,
    token: str | None = None,
    torch_dtype: torch.dtype | str | None = torch.bfloat16,
    **kwargs: Any,
) -> nn.Module:
    """Loads a causal language model with wrapped MoE blocks.

    Everything but the experts moves to the GPU, if there is one.

    Args:
        config: the model's configuration.
        model_args: object with attributes model_name_or_path and ``kt_*``.
        finetuning_args: object with attributes lora_rank and lora_alpha.
        kt_plugin: settings in place of model_args, as for :func:`wrap_moe_layers_with_kt_wrapper`.
        model_name_or_path, trust_remote_code, token, torch_dtype, kwargs: for ``from_pretrained``.

    Raises:
        KTAMXConfigError: neither kt_plugin nor model_args, or no model_name_or_path.
        KTAMXModelNotSupportedError: kt_kernel does not know the architecture.
    """
    source = model_args if kt_plugin is None else kt_plugin
    path = model_name_or_path or getattr(model_args, "model_name_or_path", None)
    if source is None or path is None:
        raise KTAMXConfigError("load_kt_model: give model_args, or kt_plugin and model_name_or_path")
    adapter = {
        "kt_lora_rank": kt_value(source, "kt_lora_rank") or getattr(finetuning_args, "lora_rank", None),
        "kt_lora_alpha": kt_value(source, "kt_lora_alpha") or getattr(finetuning_args, "lora_alpha", None),
    }
    loading = get_kt_loading_kwargs(config, source, torch_dtype, trust_remote_code, token)
    for name in ("cache_dir", "revision"):
        if getattr(model_args, name, None) is not None:
            loading[name] = getattr(model_args, name)

    def wrap(model: nn.Module) -> None:
        loaded = {key: kt_value(source, key) for key in ("kt_num_threads", "kt_backend")}
        wrap_moe_layers_with_kt_wrapper(model, loaded | adapter)

    return load_model(path, wrap, **loading | kwargs)
