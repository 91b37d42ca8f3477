"""Experts whose arguments are checked once, for calls that would take longer to pass than to compute."""

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ktops._modes import call_without_modes
from ktops.nn.host_memory import ON_DEVICE
from ktops.ops.moe_sft import moe_arguments

_moe_fwd_prepared = torch.ops.kt.moe_fwd_prepared.default

PREPARED = "_prepared"
"""The attribute of experts that holds a :class:`PreparedExperts`. Copies and files of experts have None."""


class PreparedExperts:
    """The arguments of kt::moe_fwd except the tokens, as the operators keep them until this object is gone.

    The operator notices if one of the tensors got other memory, and then takes what it holds now.

    Args:
        arguments: those of a call.
        key: what the arguments were made of; see :func:`_key`.
        lora_key: what the LoRA arguments were; see :func:`_lora_key`.
    """

    def __init__(self, arguments: tuple, key: list, lora_key: tuple) -> None:
        self.key, self.lora_key = key, lora_key
        self.experts: int = torch.ops.kt.prepare_moe(*arguments)
        release = torch.ops.kt.release_moe.default
        weakref.finalize(self, call_without_modes, release, self.experts).atexit = False

    def __reduce__(self):
        return type(None), ()


def forward_prepared(
    experts: Any, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, lora: dict[str, Any]
) -> Tensor | None:
    """Runs a KTExperts in inference on the CPU; returns None where only the general path is possible.

    The factors in ``lora`` may be new views in each call. They are compared by what they point to, which the
    views that are held keep from being used for anything else.

    That is the case with gradients, in training mode, under torch.compile and other modes that see operators,
    for tokens of another shape or dtype than those of the operator, and for what it does not compute alone.
    """
    if (
        torch.is_grad_enabled()
        or experts.training
        or type(hidden_states) is not Tensor
        or not hidden_states.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or experts.transposed
        or experts.post_expert_norm is not None
        or ON_DEVICE in experts._modules
        or "parametrizations" in experts._modules  # of PEFT, whose adapters change the weights for a call
        or "_hf_hook" in experts.__dict__  # of accelerate, which loads the weights for a call
        or hidden_states.dim() != 2
        or topk_ids.dim() != 2
        or not topk_weights.is_floating_point()
        or topk_weights.shape != topk_ids.shape
    ):
        return None
    try:
        key = _key(experts)
    except KeyError:  # a weight is no longer a Parameter, as after pruning
        return None
    lora_key = _lora_key(lora)
    if hidden_states.dtype != key[0] or lora_key is None:
        return None
    prepared: PreparedExperts | None = experts.__dict__.get(PREPARED)
    if prepared is None or prepared.lora_key != lora_key or not _same(prepared.key, key):
        arguments = _arguments(experts, hidden_states, topk_ids, topk_weights, lora)
        if not all(argument.is_cpu for argument in arguments if isinstance(argument, Tensor)):
            return None  # the general path names the tensor
        prepared = PreparedExperts(arguments, key, lora_key)
        experts.__dict__[PREPARED] = prepared
    return _moe_fwd_prepared(hidden_states, topk_ids, topk_weights, prepared.experts)


def _key(experts: Any) -> list[Any]:
    """Returns the dtype of the weights, and what their arguments are made of, to be compared by identity."""
    first = experts.function.first_name
    parameters, modules = experts._parameters, experts._modules
    key: list[Any] = [None, experts.function, experts.compute]
    for name in (first, "down_proj"):
        weight: Any = modules.get(name)
        if weight is None:
            weight = parameters[name]
            key.append(weight)
        else:
            key += weight._buffers.values()
        key[0] = weight.dtype
    key.append(parameters[f"{first}_bias"])
    key.append(parameters["down_proj_bias"])
    return key


def _same(old: list, new: list) -> bool:
    return len(old) == len(new) and all(map(is_, old, new))


def _lora_key(lora: dict[str, Any]) -> tuple | None:
    """Returns the LoRA arguments to be compared by value, factors by where and how they are stored.

    None if a factor is of a class that may not say where it is stored.
    """
    key: list[Any] = []
    for name, value in lora.items():
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter):
                return None
            key += (name, value.data_ptr(), value.dtype, value.shape, value.stride())
        else:
            key += (name, value)
    return tuple(key)


def _arguments(
    experts: Any, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, lora: dict[str, Any]
) -> tuple:
    gate_up_proj, down_proj = experts.layout.weights(experts)
    gate_up_bias, down_bias = experts.layout.biases(experts)
    return moe_arguments(
        hidden_states=hidden_states,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        gate_up_proj=gate_up_proj,
        down_proj=down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        compute=experts.compute,
        **experts.function._asdict(),
        **lora,
    )
