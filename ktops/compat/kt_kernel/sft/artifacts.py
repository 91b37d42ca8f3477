"""What transformers asks of kt-kernel while it loads a model, and the files of adapters.

Experts whose weights the checkpoint has in the wanted form are loaded by transformers like all other weights.
ktops loads those that kt_weight_path, kt_backend or kt_expert_weight_format ask for otherwise; transformers
then leaves placeholders, which :func:`wrap_moe_layers_with_kt_wrapper` replaces.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktops.compat.kt_kernel.sft.adapter_files import (  # noqa: F401 (names that clients import from here)
    FUSED_EXPERT_LORA_NAME,
    KT_ADAPTER_MANIFEST_NAME,
    KTAdapterManifest,
    KTArtifactError,
    load_kt_adapter_artifacts,
    save_kt_adapter_artifacts,
)
from ktops.compat.kt_kernel.sft.config import KTConfig
from ktops.nn.find import find_experts

KT_NON_EXPERT_MANIFEST_NAME = "kt_non_expert_manifest.json"

_EXPERT_WEIGHTS = re.compile(r"\.experts\.(\d+\.|(gate_up|gate|up|down)_proj(\.|$))")


@dataclass
class _Load:
    """The load of a model that is in progress, which transformers reports in several calls.

    Attributes:
        config: what the experts are to be.
        skips_experts: whether transformers leaves their weights out, for ktops to load.
    """

    config: KTConfig | None = None
    skips_experts: bool = False


_load = _Load()


class KTNonExpertCache:
    """Not supported: kt_kernel's copy of a checkpoint's other weights in bfloat16."""

    def __init__(self, *args, **kwargs) -> None:
        raise NotImplementedError(_NO_CACHE)


class KTPretrainedLoadPlan(KTNonExpertCache):
    """Not supported: how to load a model from such a copy."""


_NO_CACHE = (
    "ktops reads the weights outside the experts from the checkpoint itself, not from a cache: leave "
    "kt_non_expert_weight_path out"
)


def resolve_kt_pretrained_artifacts(
    kt_config: Any, pretrained_model_name_or_path: Any, quantization_config: Any | None = None
) -> None:
    """Checks the configuration at the start of from_pretrained. Returns None: no weights come from elsewhere.

    Raises:
        TypeError, ValueError: as :class:`KTConfig`.
    """
    _load.config, _load.skips_experts = KTConfig.from_object(kt_config), False


def should_disable_kt_source_quantizer(
    kt_config: Any, model_config: Any, explicit_quantization_config: Any | None = None
) -> bool:
    """Returns whether a checkpoint's quantization_config concerns the experts alone, which ktops reads.

    True for kt_backend or kt_expert_weight_format RAWINT4 and MXFP4, whose checkpoints store the other
    weights in bfloat16.
    """
    if explicit_quantization_config is not None:
        return False
    settings = KTConfig.from_object(kt_config).settings()
    quantized = getattr(model_config, "quantization_config", None) is not None
    return quantized and settings.backend.format in ("int4", "mxfp4") and settings.backend.group_size == 32


def claim_kt_routed_expert_subtrees(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the experts modules whose weights transformers is to leave out.

    These are all if the checkpoint has the weights in another form than the configuration asks for, or
    elsewhere; otherwise none.
    """
    if _load.config is None:
        return ()
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    _load.skips_experts = _load.config.settings().quantization_config(quantization) is not None
    return tuple(find_experts(model)) if _load.skips_experts else ()


def is_kt_routed_expert_parameter_name(name: str) -> bool:
    """Returns whether transformers is to leave out this weight, of the model or the checkpoint."""
    return _load.skips_experts and _EXPERT_WEIGHTS.search(name) is not None


def end_load() -> None:
    """Forgets the load in progress: transformers leaves out no weights until the next one begins."""
    _load.config, _load.skips_experts = None, False


def is_kt_supported_moe_model(model: nn.Module) -> bool:
    """Returns whether a model has experts."""
    return bool(find_experts(model))


def validate_kt_prequantized_loading_info(
    kt_config: Any, loading_info: Any, model: nn.Module | None = None
) -> None:
    """Checks that a checkpoint without its experts filled all other weights of a model.

    Args:
        loading_info: what transformers reports, an object or a mapping with missing_keys and so on.

    Raises:
        KTArtifactError: a weight outside the experts is missing or has another shape; the message lists them.
    """
    info = loading_info if isinstance(loading_info, Mapping) else vars(loading_info)
    problems = []
    for kind in ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
        names = sorted(str(entry) for entry in info.get(kind) or () if not _EXPERT_WEIGHTS.search(str(entry)))
        if names:
            problems.append(f"{kind}: {', '.join(names)}")
    if problems:
        raise KTArtifactError(
            f"the checkpoint does not fit the model, apart from its experts: {'; '.join(problems)}"
        )


def validate_kt_pretrained_load(plan: Any, loading_info: Any, model: nn.Module) -> None:
    """Raises NotImplementedError: there are no load plans."""
    raise NotImplementedError(_NO_CACHE)


def mark_kt_int8_routed_expert_base_parameters(model: nn.Module, plan: Any) -> tuple[str, ...]:
    """Raises NotImplementedError: there are no load plans."""
    raise NotImplementedError(_NO_CACHE)


def write_kt_non_expert_cache_manifest(*args, **kwargs) -> None:
    """Raises NotImplementedError: there are no caches of other weights."""
    raise NotImplementedError(_NO_CACHE)


def is_kt_routed_expert_base_parameter(parameter: Any) -> bool:
    """Returns whether a parameter is a placeholder that transformers left for weights of experts."""
    return isinstance(parameter, torch.Tensor) and is_placeholder(parameter)


is_kt_int8_routed_expert_base_parameter = is_kt_routed_expert_base_parameter


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Returns whether a tensor has a shape but no memory for its values."""
    return parameter.numel() > 1 and parameter.device.type != "meta" and not any(parameter.stride())


@contextmanager
def project_kt_routed_experts_out_of_device_map(model: nn.Module) -> Iterator[None]:
    """Lets a device map be inferred as if the experts were empty, because they stay in CPU memory."""
    modules = [module for experts in find_experts(model).values() for module in experts.modules()]
    held = [(module, module._parameters.copy()) for module in modules]
    try:
        for module, parameters in held:
            for name, parameter in parameters.items():
                if parameter is not None:
                    empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        yield
    finally:
        for module, parameters in held:
            module._parameters.update(parameters)


def prepare_kt_non_expert_device_map(model: nn.Module, device_map: Any) -> Any:
    """Returns a device map that places every experts module in CPU memory."""
    experts = list(find_experts(model))
    if not isinstance(device_map, Mapping) or not experts:
        return device_map
    others = {
        name: device
        for name, device in device_map.items()
        if not any(name == path or name.startswith(f"{path}.") for path in experts)
    }
    return {**others, **dict.fromkeys(experts, "cpu")} if _has_accelerator(others) else others


def _has_accelerator(device_map: Mapping[str, Any]) -> bool:
    return any(str(device) not in ("cpu", "disk", "meta") for device in device_map.values())


@contextmanager
def hide_kt_routed_experts_from_dispatch(model: nn.Module) -> Iterator[None]:
    """Lets accelerate place hooks on a model without its experts, which move hidden states themselves."""
    held = []
    try:
        for path, experts in find_experts(model).items():
            parent, _, name = path.rpartition(".")
            registry = model.get_submodule(parent)._modules
            registry[name] = nn.Module()
            held.append((registry, name, experts))
        yield
    finally:
        for registry, name, experts in held:
            registry[name] = experts


project_kt_int8_routed_experts_out_of_device_map = project_kt_routed_experts_out_of_device_map
prepare_kt_int8_non_expert_device_map = prepare_kt_non_expert_device_map
hide_kt_int8_routed_experts_from_dispatch = hide_kt_routed_experts_from_dispatch


def get_kt_fused_lora_exclude_modules(kt_config: Any, model: nn.Module) -> str | None:
    """Returns None: PEFT finds no linear layers in experts that ktops runs, so none need excluding.

    Raises:
        ktops.compat.kt_kernel.sft.arch.KTAMXConfigError: no experts of the model run through ktops.
    """
    from ktops.compat.kt_kernel.sft.adaptation import find_wrappers

    find_wrappers(model)
    return None
