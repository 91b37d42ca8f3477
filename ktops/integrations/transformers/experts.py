"""The entry "ktops" in transformers' experts interface."""

from typing import cast

import torch
from torch import Tensor, nn

from ktops._warn import warn_once
from ktops.integrations.transformers.architectures import Unsupported, class_name, operands
from ktops.nn.experts import KTExperts, run_experts
from ktops.nn.frozen_lora import lora_arguments
from ktops.nn.host_memory import ON_DEVICE
from ktops.nn.layout import Layout
from ktops.nn.streaming import streaming_threshold

NAME = "ktops"
"""The name of the implementation: ``experts_implementation=NAME``."""


def layout_in_op(experts: nn.Module) -> Layout | None:
    """Returns what the op computes for an experts module with the weights it holds now.

    None if another implementation runs: the module is neither a KTExperts nor one of transformers set to
    "ktops", or the op cannot read its weights.
    """
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation != NAME and not isinstance(experts, KTExperts):
        return None
    try:
        layout, *_ = operands(experts)
    except Unsupported:
        return None
    return layout


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **lora
) -> Tensor:
    """Runs an experts module with ``experts_implementation="ktops"``.

    Args:
        experts: the module, with the attributes that ``use_experts_implementation`` gives it.
        hidden_states, top_k_index, top_k_weights: [T, H], [T, K], [T, K].
        lora: the LoRA arguments of :func:`ktops.moe_sft`.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        NotImplementedError: LoRA arguments for a module that the op does not support.
    """
    lora = lora_arguments(experts, lora)
    try:
        layout, gate_up_proj, down_proj = operands(experts)
    except Unsupported as reason:
        return _own_forward(experts, str(reason), lora, hidden_states, top_k_index, top_k_weights)
    gate_up_bias, down_bias = layout.biases(experts)
    return run_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        **layout.function._asdict(),
        post_expert_norm=layout.norm(experts),
        stream_min_tokens=streaming_threshold(experts, hidden_states),
        on_device=experts._modules.get(ON_DEVICE),
        **lora,
    )


def _own_forward(experts: nn.Module, reason: str, lora: dict, *args: Tensor) -> Tensor:
    """Runs transformers' own implementation: "grouped_mm", its default, or eager for quantized experts."""
    name = class_name(experts)
    if lora:
        raise NotImplementedError(f"ktops: LoRA on {name} cannot be computed: {reason}")
    _warn(f"ktops does not run {name}: {reason}. It runs with transformers' own implementation instead.")
    if cast(Tensor, experts.down_proj).element_size() == 1:
        return _eager_forward(type(experts))(experts, *args)
    return _grouped_mm()(experts, *args)


def _eager_forward(experts_class: type[nn.Module]):
    """Returns the forward beneath all wrappers of ``use_experts_implementation``; each fp8 layer adds one."""
    forward = experts_class.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """Warns once per message; under torch.compile, while tracing."""
    warn_once(message)


def _grouped_mm():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"]
