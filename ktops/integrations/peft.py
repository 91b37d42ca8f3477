"""PEFT's LoRA on stacked expert parameters, computed by the op instead of through dense deltas.

PEFT nests one ``ParamWrapper`` per adapted parameter around an experts module and, in every forward,
builds ``W + scaling * B A`` for the whole stack. After ``enable()``, a wrapper whose experts run through
ktops passes its two factors as keyword arguments to the module it wraps instead. The experts module receives
the factors of all its wrappers and passes them to ``ktops.moe_sft``. Everything else in PEFT stays the same:
parameters, names, files.
"""

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ktops._warn import warn_once
from ktops.devices import streams
from ktops.formats import ExpertWeight
from ktops.integrations.merging import require_dense, require_mergeable, require_undivided
from ktops.integrations.replacements import Replacements, replaced_in
from ktops.integrations.sharded_experts import (
    local_factors,
    note_sharding,
    shape_of_all,
    shard_factors,
    sharding_of,
)
from ktops.integrations.transformers.experts import layout_in_op
from ktops.nn.device_experts import refresh
from ktops.nn.expert_list import interception
from ktops.nn.find import without_base_layer
from ktops.nn.frozen_lora import passing_lora
from ktops.nn.host_memory import Convert, is_kept, staying
from ktops.nn.int8_linear import Int8Linear
from ktops.nn.layout import Layout

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

PREFIXES = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
"""Adapted parameter -> prefix of its keyword arguments: ``gate_up_lora_A``, ``gate_up_scaling``, ..."""

LORA_PREFIXES = tuple(f"{prefix}_" for prefix in dict.fromkeys(PREFIXES.values()))

MIN_VERSION = "0.18"
"""The first version of PEFT that transformers with stacked experts works with."""

SWAPPED = ("_did_swap_in_out_features", "_swapped_in_out")
"""Attributes of a wrapper that took its parameter for [E, out, in]. PEFT 0.18 never does, unless an adapter
was loaded with the method of transformers before 5.4, which sets the second."""

_STACKED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

_replaced = Replacements()


def enable() -> None:
    """Routes PEFT's LoRA on expert parameters into the op, for models whose experts run through ktops.

    LoRA on the weights of linear layers is multiplied as factors, too. Other models and other parameters keep
    PEFT's own forward.
    Applies to existing and future models. Called by ``ktops.enable()``.

    Raises:
        ImportError: PEFT is not installed.
    """
    import peft
    from packaging.version import Version

    if _replaced:
        return
    if Version(peft.__version__) < Version(MIN_VERSION):
        warnings.warn(
            f"ktops needs peft>={MIN_VERSION} for LoRA on experts, found {peft.__version__}. PEFT's own "
            "path, with dense deltas, runs instead. To upgrade: pip install -U peft",
            stacklevel=2,
        )
        return
    from peft.tuners.lora import model as lora_model
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    if hasattr(lora_model, "get_tp_plan_and_mesh"):
        _replaced.install(lora_model, get_tp_plan_and_mesh=_get_tp_plan_and_mesh)
    _replaced.install(
        ParamWrapper,
        forward=_forward,
        merge=_merge,
        unmerge=_unmerge,
        get_param=_get_param,
        update_layer=_update_layer,
        _apply=_apply,
    )
    _replaced.install(
        BaseTuner,
        inject_adapter=_inject_adapter,
        merge_adapter=_merge_adapter,
        _unload_and_optionally_merge=_unload_and_optionally_merge,
    )


def enable_if_installed() -> None:
    """Calls :func:`enable` if PEFT and transformers are installed; otherwise does nothing."""
    if all(importlib.util.find_spec(name) is not None for name in ("transformers", "peft")):
        enable()


def disable() -> None:
    """Restores PEFT's own methods."""
    _replaced.restore()


def expert_target_parameters(model: nn.Module) -> list[str]:
    """Returns the ``target_parameters`` for ``LoraConfig`` that reach every routed expert of a model.

    Args:
        model: a transformers model, with or without PEFT adapters, swapped or not.

    Returns:
        Parameter names within a layer, e.g. ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``.
        Empty if no experts are stored as stacked ``[num_experts, ...]`` parameters.

    Example:
        >>> LoraConfig(r=16, target_modules=["q_proj"], target_parameters=expert_target_parameters(model))
    """
    found: dict[str, None] = {}
    for name, module in _experts(model):
        path = without_base_layer(name.removeprefix("base_model.model."))
        suffix = re.split(r"(?:^|\.)\d+\.", path)[-1]
        for parameter in _STACKED:
            if _is_stack(module, parameter):
                found[f"{suffix}.{parameter}" if suffix else parameter] = None
    return list(found)


def _is_stack(module: nn.Module, parameter: str) -> bool:
    tensor = module._parameters.get(parameter)
    return (tensor is not None and tensor.dim() == 3) or _in_format(module, parameter)


def _in_format(module: nn.Module, parameter: str) -> bool:
    return isinstance(module._modules.get(parameter), ExpertWeight)


def _weights_in_formats(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name, weight) of the weights of a module that are no Parameters, but can have adapters."""
    if isinstance(module, Int8Linear):
        yield "weight", module.qweight
    else:
        yield from ((name, child) for name, child in module._modules.items() if _in_format(module, name))


@contextmanager
def _weights_in_formats_as_parameters(model: nn.Module) -> Iterator[None]:
    """Makes modules list their weights in formats as parameters, so that PEFT can target them."""
    modules = [module for _, module in _experts(model) if _in_format(module, "down_proj")]
    modules += [module for module in model.modules() if isinstance(module, Int8Linear)]

    def named_parameters(module: nn.Module, *args, **kwargs):
        yield from type(module).named_parameters(module, *args, **kwargs)
        yield from _weights_in_formats(module)

    with replaced_in(modules, "named_parameters", named_parameters):
        yield


def _get_param(wrapper: "ParamWrapper") -> Any:
    """``ParamWrapper.get_param``, which PEFT asks for shape, dtype and device.

    NaN for weights in int8, and for those of which other processes have a part.
    """
    base = wrapper.get_base_layer()
    if isinstance(base, Int8Linear) and wrapper.parameter_name == "weight":
        return base.scale.new_full((), torch.nan).expand(base.out_features, base.in_features)
    weight = _replaced.original["get_param"](wrapper)
    shape = shape_of_all(base, weight)
    return weight if shape == weight.shape else torch.full((), torch.nan, dtype=weight.dtype).expand(shape)


def _get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[Any, Any]:
    """PEFT's function for linear layers that are divided among processes, which fails for experts."""
    module: Any = model.get_submodule(current_key.rpartition(".")[0])
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if sharding_of(base) is not None:
        return None, None
    return _replaced.original["get_tp_plan_and_mesh"](model, current_key)


def _update_layer(wrapper: "ParamWrapper", adapter_name: str, *args, **kwargs) -> None:
    """``ParamWrapper.update_layer``, which adds an adapter: divided among processes, as the weights are."""
    _replaced.original["update_layer"](wrapper, adapter_name, *args, **kwargs)
    shard_factors(wrapper, adapter_name)


def _experts(model: nn.Module):
    for name, module in model.named_modules():
        is_shared = "shared" in without_base_layer(name).rpartition(".")[2]
        if _is_stack(module, "down_proj") and not is_shared:
            yield name, module


def _lora_arguments(
    wrapper: "ParamWrapper", layout: Layout, adapters: list[str]
) -> dict[str, Tensor | float]:
    """Returns the keyword arguments of one wrapper: A [E, r, in], B [E, out, r], scaling.

    PEFT stores ``lora_A.weight [r * E, in]`` with the expert outermost and ``lora_B.weight [out, r * E]``
    with the expert innermost; both are passed as views. Several adapters become one adapter with the sum of
    their ranks, with each scaling multiplied into the adapter's columns of B.

    PEFT takes a stack for [E, in, out], or if it has swapped the two, for [E, out, in]. Where it mistakes one
    for the other, its B A is the transpose of the delta, so the factors exchange roles: for Llama-4, which
    does not say that its stacks are transposed, and before PEFT 0.19.1 for most models.
    """
    exchanged = layout.transposed == any(getattr(wrapper, name, False) for name in SWAPPED)
    lora_a, lora_b = [], []
    for name in adapters:
        a, b = local_factors(wrapper, name)
        num_experts = a.shape[0] // wrapper.r[name]
        a = a.reshape(num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, num_experts)
        lora_a.append(b.permute(2, 1, 0) if exchanged else a)
        lora_b.append(a.permute(0, 2, 1) if exchanged else b.permute(2, 0, 1))
    prefix = PREFIXES[wrapper.parameter_name]
    if len(adapters) == 1:
        a, b, scaling = lora_a[0], lora_b[0], wrapper.scaling[adapters[0]]
    else:
        a = torch.cat(lora_a, dim=1)
        b = torch.cat([wrapper.scaling[name] * b for name, b in zip(adapters, lora_b, strict=True)], dim=2)
        scaling = 1.0
    return {f"{prefix}_lora_A": a, f"{prefix}_lora_B": b, f"{prefix}_scaling": scaling}


def _layout_for_factors(wrapper: "ParamWrapper", kwargs: dict) -> Layout | None:
    """Returns the layout of the experts if this call can bypass PEFT's own forward, else None.

    PEFT's forward builds the dense delta, or raises.
    """
    if wrapper.parameter_name not in PREFIXES or "adapter_names" in kwargs:
        return None
    return layout_in_op(wrapper.get_base_layer())


def _forward(wrapper: "ParamWrapper", x: Tensor, *args, **kwargs) -> Tensor:
    """``ParamWrapper.forward``, which passes factors instead of the dense delta if the experts run ktops."""
    layout = _layout_for_factors(wrapper, kwargs)
    if layout is None:
        if not args and not kwargs and (adapters := lora_of_linear(wrapper)):
            return _forward_linear(wrapper, x, adapters)
        require_dense(wrapper, "computed with different adapters in one batch")
        return _replaced.original["forward"](wrapper, x, *args, **kwargs)
    if wrapper.disable_adapters:
        if wrapper.merged:
            wrapper.unmerge()
    elif not wrapper.merged:
        adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if any(name in wrapper.lora_variant for name in adapters):
            variants = ", ".join(type(v).__name__ for v in wrapper.lora_variant.values())
            require_dense(wrapper, f"computed as {variants}")
            require_undivided(wrapper, f"computed as {variants}")
            warn_once(
                f"ktops does not compute the LoRA variant {variants} on expert parameters; PEFT does, with a "
                "dense delta of all experts in every forward."
            )
            return _replaced.original["forward"](wrapper, x, *args, **kwargs)
        if adapters:
            kwargs = {**kwargs, **_lora_arguments(wrapper, layout, adapters)}
    if sharding_of(wrapper.base_layer) is None:
        return wrapper.base_layer(x, *args, **kwargs)
    lora = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(LORA_PREFIXES)}
    with passing_lora(wrapper.base_layer, lora):
        return wrapper.base_layer(x, *args, **kwargs)


def lora_of_experts(wrapper: nn.Module) -> dict[str, Tensor | float] | None:
    """Returns the LoRA arguments that a wrapper, and those inside it, pass to experts in every call.

    None if that could change, as for merged and disabled adapters, or if PEFT's own forward runs.
    """
    from peft.tuners.lora.layer import ParamWrapper

    arguments: dict[str, Tensor | float] = {}
    while isinstance(wrapper, ParamWrapper):
        layout = _layout_for_factors(wrapper, {})
        adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if layout is None or wrapper.merged or wrapper.disable_adapters or interception(wrapper):
            return None
        if any(name in wrapper.lora_variant for name in adapters):
            return None
        if adapters:
            arguments |= _lora_arguments(wrapper, layout, adapters)
        wrapper = wrapper.base_layer
    return arguments


def lora_of_linear(layer: "LoraLayer") -> list[str]:
    """Returns the adapters of a linear layer, or of its weight, that add products of its input.

    Empty if they are merged or disabled, or if one of them is of another kind.
    """
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or any(name in layer.lora_variant for name in adapters):
        return []
    if getattr(layer, "parameter_name", "weight") != "weight" or not isinstance(layer.base_layer, nn.Linear):
        return []
    return adapters


def _forward_linear(wrapper: "ParamWrapper", x: Tensor, adapters: list[str]) -> Tensor:
    """Runs a linear layer with LoRA on its weight as PEFT runs one with LoRA on the layer."""
    result = wrapper.base_layer(x)
    dtype = result.dtype
    for name in adapters:
        a, b = wrapper.lora_A[name], wrapper.lora_B[name]
        result = result + b(a(x.to(a.weight.dtype))) * wrapper.scaling[name]
    return result.to(dtype)


def _apply(wrapper: "ParamWrapper", fn: Convert, recurse: bool = True) -> nn.Module:
    """``ParamWrapper._apply``, which leaves adapters where their experts stay, in CPU memory."""
    if not recurse or not is_kept(wrapper.get_base_layer()):
        return _replaced.original["_apply"](wrapper, fn, recurse)
    for child in wrapper.children():
        child._apply(fn if child is wrapper.base_layer else staying(fn))
    return wrapper


def _merge(wrapper: "ParamWrapper", *args, **kwargs) -> None:
    """``ParamWrapper.merge``, which raises for weights in a format, because they cannot hold the sum."""
    require_dense(wrapper, "merged")
    require_undivided(wrapper, "merged")
    streams.synchronize()  # calls that are enqueued still read the weights
    _replaced.original["merge"](wrapper, *args, **kwargs)
    refresh(wrapper.get_base_layer())


def _unmerge(wrapper: "ParamWrapper") -> None:
    """``ParamWrapper.unmerge``."""
    streams.synchronize()
    _replaced.original["unmerge"](wrapper)
    refresh(wrapper.get_base_layer())


def _merge_adapter(tuner, adapter_names: list[str] | None = None, *args, **kwargs) -> None:
    """``BaseTuner.merge_adapter``, which raises before merging any layer if one cannot be merged."""
    require_mergeable(tuner, adapter_names)
    _replaced.original["merge_adapter"](tuner, adapter_names, *args, **kwargs)


def _unload_and_optionally_merge(tuner, merge: bool = True, *args, **kwargs) -> nn.Module:
    """``BaseTuner.merge_and_unload``, which raises before merging any layer if one cannot be merged."""
    if merge:
        require_mergeable(tuner, kwargs.get("adapter_names"))
    return _replaced.original["_unload_and_optionally_merge"](tuner, merge, *args, **kwargs)


_MLP_NAMES = {"experts", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "all-linear"}


def _asks_for_experts(target_modules: str | set[str] | list[str] | None) -> bool:
    """True if the names include a model's MLP projections and do not mention shared experts."""
    names = [target_modules] if isinstance(target_modules, str) else target_modules or []
    return any(
        "shared" not in name and _MLP_NAMES.intersection(re.findall(r"[\w-]+", name)) for name in names
    )


def _inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    """``BaseTuner.inject_adapter``, which warns if LoRA meant for the experts does not reach them."""
    config = self.peft_config[adapter_name]
    asked = config.peft_type == "LORA" and not config.inference_mode
    asked = asked and (config.target_parameters or _asks_for_experts(config.target_modules))
    for _, experts in _experts(model):
        if layout_in_op(experts) is not None:
            note_sharding(model, experts)
    with _weights_in_formats_as_parameters(model):
        _replaced.original["inject_adapter"](self, model, adapter_name, *args, **kwargs)
    if asked:
        _warn_if_experts_missed(model, adapter_name)


def _warn_if_experts_missed(model: nn.Module, adapter_name: str) -> None:
    experts = dict(_experts(model))
    if not experts or any(
        getattr(module, "parameter_name", None) in _STACKED and adapter_name in getattr(module, "lora_A", ())
        for module in model.modules()
    ):
        return
    warnings.warn(
        f"LoRA adapter {adapter_name!r} does not reach the routed experts of {type(model).__name__} "
        f"({len(experts)} layers): their weights are stacked parameters, not linear modules. To train them, "
        f"use LoraConfig(target_parameters={expert_target_parameters(model)}).",
        stacklevel=3,
    )
