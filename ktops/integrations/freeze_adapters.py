"""freeze_adapters: makes the LoRA adapters of a model a part of its layers, for inference without PEFT."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktops.integrations.peft import lora_of_experts, lora_of_linear
from ktops.integrations.swap import exchange, stacked_experts
from ktops.integrations.transformers.architectures import Unsupported
from ktops.nn.expert_list import interception, is_plain_linear
from ktops.nn.experts import KTExperts
from ktops.nn.frozen_lora import FROZEN_LORA, FrozenLora, FrozenLoraLinear

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def freeze_adapters(model: "PeftModel") -> nn.Module:
    """Makes the active LoRA adapters of a model a part of its experts and linear layers, for inference.

    The model computes the same, and takes less time to decode a token: the factors of experts are copied into
    the order in which the operator reads them, and PEFT's modules around the layers are gone. The adapters
    cannot be trained, switched, disabled, merged or saved any more. Experts as transformers stores them
    become :class:`ktops.nn.KTExperts` with the same Parameters.

    Layers with other adapters than one plain LoRA, with merged or disabled ones, or with hooks stay PEFT's.

    Args:
        model: in evaluation mode. It is changed, and should not be used any more.

    Returns:
        The model inside it.

    Example:
        >>> model = ktops.freeze_adapters(PeftModel.from_pretrained(model, "out"))
        >>> model.generate(**tokenizer("Hello", return_tensors="pt"))
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    base = model.get_base_model()
    wrappers = {module for module in base.modules() if isinstance(module, ParamWrapper)}
    linear = {module for module in base.modules() if type(module) is Linear}
    linear |= {wrapper for wrapper in wrappers if isinstance(wrapper.base_layer, nn.Linear)}
    wrappers -= {wrapper.base_layer for wrapper in wrappers} | linear
    _freeze(base, wrappers, _frozen_experts)
    _freeze(base, linear, _frozen_linear)
    return base


def _freeze(model: nn.Module, modules: set, frozen: Callable[[Any], nn.Module | None]) -> None:
    while modules:  # so that only one is in memory twice
        module = modules.pop()
        replacement = frozen(module)
        if replacement is not None:
            exchange(model, module, replacement)


def _frozen_experts(wrapper: Any) -> nn.Module | None:
    lora = lora_of_experts(wrapper)
    if lora is None:
        return None
    experts = wrapper.get_base_layer()
    if not isinstance(experts, KTExperts):
        try:
            experts = stacked_experts(experts, "activations")
        except Unsupported:
            return None
    if lora:
        experts.add_module(FROZEN_LORA, FrozenLora(lora))
    return experts


def _frozen_linear(layer: Any) -> nn.Module | None:
    adapters = lora_of_linear(layer)
    if len(adapters) != 1 or interception(layer):
        return None
    name = adapters[0]
    a, b = layer.lora_A[name], layer.lora_B[name]
    if not (is_plain_linear(a) and is_plain_linear(b)) or b.bias is not None:
        return None
    return FrozenLoraLinear(layer.base_layer, a.weight, b.weight, layer.scaling[name])
