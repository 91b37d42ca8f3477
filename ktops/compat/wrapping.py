"""Replaces the MoE blocks of a model by :class:`~ktops.compat.layer.MoELayer`, and loads such models."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

import ktops
from ktops._warn import warn_once
from ktops.checkpoints.names import layer_number
from ktops.compat.kt_kernel.sft.arch import (
    KTAMXConfigError,
    KTAMXModelNotSupportedError,
    MOEArchConfig,
    get_moe_arch_config,
)
from ktops.compat.layer import AdaptedExperts, MoELayer, adapted_experts
from ktops.compat.methods import Method
from ktops.compat.sft import SFTWrapper
from ktops.formats import ExpertWeight
from ktops.integrations.settings import DENSE, KEYS, Settings, set_num_threads, take_settings
from ktops.integrations.swap import (
    Unsupported,
    exchange,
    exchange_stacked,
    listed_experts,
    require_experts,
    stacked_experts,
)
from ktops.nn.expert_list import stacked_copy
from ktops.nn.experts import KTExperts

Layer = TypeVar("Layer", bound=MoELayer)

ADAPTER_KEYS = frozenset({"kt_lora_rank", "kt_lora_alpha", "kt_lora_dropout", "kt_config"})
"""Keys that the functions of kt_kernel read themselves."""


def kt_value(source: object, key: str) -> Any:
    """Returns an attribute or key of an object of arguments, or of its ``kt_config``; None if absent."""
    inner = source.get("kt_config") if isinstance(source, Mapping) else getattr(source, "kt_config", None)
    source = source if inner is None else inner
    return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)


def settings_of(source: object) -> Settings:
    """Reads the ``kt_*`` attributes, or keys, of an object of arguments.

    Raises:
        KTAMXConfigError: a key has a wrong value, or asks for what ktops does not do.
    """
    given = {key: kt_value(source, key) for key in KEYS - ADAPTER_KEYS}
    try:
        settings = take_settings({**given, "use_kt": True})
    except ValueError as error:
        raise KTAMXConfigError(str(error)) from None
    assert settings is not None
    return settings


def use_threads(num_threads: int | None) -> None:
    """Makes torch, and so ktops, compute with this many threads; warns if there are fewer cores."""
    if num_threads is not None and (cores := set_num_threads(num_threads)) < num_threads:
        warn_once(f"ktops: kt_num_threads is {num_threads}, but there are {cores} cores: using {cores}")


def warn_without_amx(backend: object) -> None:
    """Says which kernels run instead, once, if an AMX backend was asked for and the CPU has no AMX."""
    if str(backend or "").upper().startswith("AMX") and ktops.cpu_capability() != "amx_bf16":
        warn_once(
            f"Intel AMX not supported on this CPU: ktops computes kt_backend {backend} with its "
            f"{ktops.cpu_capability()} kernels instead. AMX needs a Xeon of the 4th generation or later, and "
            "must be enabled in the BIOS and passed to a virtual machine"
        )


def wrap_layers(
    model: nn.Module,
    settings: Settings,
    make: Callable[[nn.Module, SFTWrapper, MOEArchConfig, int], Layer],
    *,
    lora_rank: int,
    lora_alpha: float,
) -> list[Layer]:
    """Replaces every MoE block of a model, in place.

    Args:
        model: on the CPU, without adapters on its experts.
        settings: in what format to store the experts, and where to load them from.
        make: (block, backend, moe_config, layer_idx) -> the wrapper.

    Returns:
        The wrappers in the order of the layers, which are also ``model._kt_wrappers``.

    Raises:
        KTAMXModelNotSupportedError: the architecture is unknown, or the op does not compute its experts.
        KTAMXConfigError: the model has been wrapped before.
    """
    moe_config = get_moe_arch_config(model.config)
    if getattr(model, "_kt_wrappers", None):
        raise KTAMXConfigError("the model's MoE layers have been wrapped before, see model._kt_wrappers")
    use_threads(settings.num_threads)
    _store(model, settings)
    wanted, group_size, _ = settings.backend
    method = Method(wanted or "", group_size, trains_lora=settings.trains_experts)
    wrappers: list[Layer] = []
    for name, experts in _adapted(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        number = layer_number(name)
        layer_idx = len(wrappers) if number is None else number
        backend = _backend(experts, method, moe_config, layer_idx, lora_rank, lora_alpha)
        wrapper = make(block, backend, moe_config, layer_idx)
        exchange(model, block, wrapper)
        wrappers.append(wrapper)
    model._kt_wrappers = wrappers  # type: ignore[assignment]  # a list, which torch does not register
    return wrappers


def _store(model: nn.Module, settings: Settings) -> None:
    """Loads the experts from elsewhere if asked to, and brings dense ones into the wanted format."""
    wanted = settings.quantization_config()
    if wanted is None:
        return
    options = {"group_size": wanted.group_size, "show_progress": False}
    if wanted.experts_path is not None:
        ktops.load_experts(model, wanted.experts_path, wanted.weight_format, **options)
    elif any(map(_is_dense, require_experts(model, "kt_kernel").values())):
        ktops.quantize_experts(model, wanted.weight_format, **options)


def _is_dense(experts: nn.Module) -> bool:
    weight = getattr(experts, "down_proj", None)
    return not isinstance(weight, ExpertWeight) or weight.format in DENSE


def _adapted(model: nn.Module) -> dict[str, AdaptedExperts]:
    """Replaces the experts of all layers by AdaptedExperts; checks all before it changes any."""
    try:
        found = require_experts(model, "kt_kernel")
        stacked = {name: _stacked(module) for name, module in found.items()}
    except (ValueError, Unsupported) as error:
        raise KTAMXModelNotSupportedError(
            f"Model architecture {type(model).__name__} not supported for KTransformers: {error}"
        ) from None
    made = {}
    for name, experts in stacked.items():
        made[name] = adapted_experts(experts())
        exchange_stacked(model, found[name], made[name])
    return {name.removesuffix(".stacked"): experts for name, experts in made.items()}


def _stacked(module: nn.Module) -> Callable[[], KTExperts]:
    if isinstance(module, KTExperts):
        return lambda: module
    if isinstance(module, nn.ModuleList):
        listed = listed_experts(module)
        return lambda: stacked_copy(listed)
    experts = stacked_experts(module, "activations")
    if type(experts) is not KTExperts:
        raise Unsupported(f"its experts take other arguments, {type(experts).__name__}")
    return lambda: experts


def _backend(
    experts: KTExperts, method: Method, moe_config: MOEArchConfig, layer_idx: int, rank: int, alpha: float
) -> SFTWrapper:
    """Returns a wrapper around the experts' own weights."""
    backend = SFTWrapper(
        "SFT",
        method,
        layer_idx=layer_idx,
        num_experts=experts.num_experts,
        num_experts_per_tok=moe_config.num_experts_per_tok,
        hidden_size=experts.hidden_size,
        moe_intermediate_size=experts.intermediate_size,
        gpu_experts_mask=None,
        num_gpu_experts=0,
        cpuinfer_threads=torch.get_num_threads(),
        threadpool_count=1,
        weight_path=None,
        prefix=None,
        chunked_prefill_size=0,
        numa_nodes=None,
        group_size=0,
        function=experts.function,
        lora_rank=rank,
        lora_alpha=alpha,
        max_cache_depth=1,
    )
    backend.gate_up_proj, backend.down_proj = experts.layout.weights(experts)
    return backend


def load_model(path: str, wrap: Callable[[nn.Module], object], **loading) -> nn.Module:
    """Loads a causal language model and wraps its MoE layers.

    Everything but the experts and their adapters moves to the GPU, if there is one.

    Raises:
        KTAMXModelNotSupportedError: the architecture in ``config`` is unknown; nothing is loaded.
    """
    from transformers import AutoModelForCausalLM

    get_moe_arch_config(loading["config"])
    ktops.enable()
    model = AutoModelForCausalLM.from_pretrained(path, **loading)
    wrap(model)
    if torch.cuda.is_available():
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return model


def wrappers_of(model: nn.Module) -> list[MoELayer]:
    """Returns the wrappers of a model, or of the model inside of PEFT's and other wrappers; may be empty."""
    for module in model.modules():
        wrappers = module.__dict__.get("_kt_wrappers")
        if wrappers:
            return wrappers
    return []
