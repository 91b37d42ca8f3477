"""Adapters on the experts of a wrapped model: making them, and finding what an optimizer trains."""

import itertools
import sys
from dataclasses import dataclass

import torch
from torch import nn

from ktops._warn import warn_once
from ktops.compat.kt_kernel.sft.arch import KTAMXConfigError
from ktops.compat.kt_kernel.sft.config import KTConfig
from ktops.compat.kt_kernel.sft.dist_utils import require_one_process
from ktops.compat.kt_kernel.sft.layer import KTMoELayerWrapper
from ktops.compat.layer import create_lora_params

NamedParameters = tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class KTAdaptationResult:
    """What :func:`kt_adapt_peft_lora` did.

    Attributes:
        adapted_layers, already_adapted_layers: numbers of layers that it changed, and found changed.
        named_optimizer_parameters: what :func:`get_kt_named_trainable_params` returns.
        placeholders, placeholder_names: empty, because the experts' weights stay in the model.
    """

    adapted_layers: int
    already_adapted_layers: int
    named_optimizer_parameters: NamedParameters
    placeholders: NamedParameters = ()
    placeholder_names: tuple[str, ...] = ()


def find_wrappers(model: nn.Module) -> list[KTMoELayerWrapper]:
    """Returns the MoE blocks that wrap_moe_layers_with_kt_wrapper replaced, inside of any other wrappers.

    Raises:
        KTAMXConfigError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, KTMoELayerWrapper)]
    if not found:
        raise KTAMXConfigError(
            f"no experts of {type(model).__name__} run through ktops: create the model with from_pretrained "
            "while KTransformers is configured (use_kt: true, TrainingArguments(kt_config=...) or "
            "transformers.integrations.kt.configure_kt), or call wrap_moe_layers_with_kt_wrapper"
        )
    return found


def kt_adapt_peft_lora(model: nn.Module) -> KTAdaptationResult:
    """Prepares the experts of a wrapped model for training, as its KTConfig asks.

    A second call changes nothing.

    In mode lora, every experts module gets six adapter Parameters, whatever PEFT's target_modules say, with
    rank kt_lora_rank, scaling kt_lora_alpha / kt_lora_rank and the dtype of the parameters that are trained
    already. They count while PEFT's adapters do. In mode full, the experts' own weights are trained; in mode
    hybrid, both. With a kt_backend that ends in _SkipLoRA, neither.

    Raises:
        KTAMXConfigError: no experts of the model run through ktops, or the configuration has no kt_lora_rank.

    Example:
        >>> wrap_moe_layers_with_kt_wrapper(model, KTConfig(kt_lora_rank=8, kt_lora_alpha=16))
        >>> model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        >>> kt_adapt_peft_lora(model).adapted_layers
        48
    """
    wrappers = find_wrappers(model)
    fresh = [wrapper for wrapper in wrappers if not wrapper.is_adapted]
    dtype, switches = _dtype_of_trained(model), _layers_of_peft(model)
    for wrapper in fresh:
        _require_rank(wrapper.config)
    for wrapper in fresh:
        if wrapper.config.trains_adapters:
            wrapper.set_adapters(_new_adapters(wrapper, dtype))
            wrapper.experts.switches = switches
        if wrapper.config.trains_weights:
            wrapper.experts.requires_grad_(True)
        wrapper.is_adapted = True
    return KTAdaptationResult(
        len(fresh), len(wrappers) - len(fresh), tuple(get_kt_named_trainable_params(model))
    )


adapt_peft_lora = kt_adapt_peft_lora


def _require_rank(config: KTConfig) -> None:
    if not config.trains_adapters:
        return
    if not config.kt_lora_rank:
        raise KTAMXConfigError("kt_lora_rank must be given to train adapters of experts, got none")
    if config.kt_lora_dropout:
        warn_once(
            f"kt_lora_dropout={config.kt_lora_dropout} has no effect on the adapters of experts, which ktops "
            "computes without dropout. Those of linear layers keep it"
        )


def _new_adapters(wrapper: KTMoELayerWrapper, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    experts, backend = wrapper.experts, wrapper.backend
    sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size, backend.lora_rank
    return create_lora_params(*sizes, backend.lora_alpha, dtype=dtype)


def _dtype_of_trained(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the model's first trained parameter, float32 without any."""
    trained = (parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    return next((dtype for dtype in trained if dtype.is_floating_point), torch.float32)


def _layers_of_peft(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns a layer of PEFT's, as all are switched together; none without PEFT."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return tuple(itertools.islice(found, 1))


def get_kt_named_trainable_params(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns what is trained of the experts, by names that do not depend on how the model is wrapped.

    Adapters are named ``kt.layers.<layer_idx>.experts.fused_lora.gate_lora_a`` and so on, the experts' own
    weights ``kt.layers.<layer_idx>.experts.base.gate_up_proj`` and so on. They are Parameters of the model,
    so an optimizer of ``model.parameters()`` has them too.

    Raises:
        KTAMXConfigError: no experts of the model run through ktops.
    """
    named = []
    for wrapper in find_wrappers(model):
        prefix = f"kt.layers.{wrapper.layer_idx}.experts"
        kinds = {"fused_lora": adapters_of(wrapper), "base": dict(wrapper.experts.named_parameters())}
        for kind, parameters in kinds.items():
            named += [(f"{prefix}.{kind}.{name}", parameter) for name, parameter in parameters.items()]
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def adapters_of(wrapper: KTMoELayerWrapper) -> dict[str, nn.Parameter]:
    """Returns the six adapters of a layer by name; empty if it has none."""
    return {} if wrapper.lora_params is None else dict(wrapper.lora_params)


get_kt_lora_named_params = get_kt_named_trainable_params


def get_kt_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """Returns the Parameters of :func:`get_kt_named_trainable_params`."""
    return [parameter for _, parameter in get_kt_named_trainable_params(model)]


get_kt_lora_params = get_kt_trainable_params


def get_kt_rank_local_parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of parameters that only one process holds: none."""
    find_wrappers(model)
    return ()


def update_kt_lora_pointers(model: nn.Module) -> None:
    """Checks, after an optimizer's step, that ktops computed the experts and what is trained of them.

    They read their adapters in every forward, so there is nothing to update.

    Raises:
        KTAMXConfigError: no experts of the model run through ktops.
        RuntimeError: some experts have never run, or what is trained of them has no gradients.
    """
    idle = [str(wrapper.layer_idx) for wrapper in find_wrappers(model) if not wrapper.experts.has_run]
    if idle:
        raise RuntimeError(
            f"ktops has not computed the experts of layers {', '.join(idle)}, although the optimizer made a "
            "step: another module runs in their place"
        )
    without = [name for name, parameter in get_kt_named_trainable_params(model) if parameter.grad is None]
    if without:
        raise RuntimeError(
            f"{without[0]} and {len(without) - 1} more have no gradients, although the optimizer made a "
            "step: backward has not reached them"
        )


def sync_kt_lora_gradients(model: nn.Module) -> None:
    """Checks that gradients need no synchronization: ktops trains in one process.

    Raises:
        KTAMXConfigError: several processes, or no experts of the model run through ktops.
    """
    require_one_process()
    find_wrappers(model)
