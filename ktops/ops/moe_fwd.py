"""kt::moe_fwd: one MoE layer, forward only. Saves nothing and has no gradient."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ktops.ops.arguments import MoeArguments
from ktops.ops.check_devices import check_devices


@torch.library.register_fake("kt::moe_fwd")
def _fake(*args) -> Tensor:
    check_devices(torch.ops.kt.moe_fwd.default, *args)
    return empty_output(MoeArguments(*args))


def _backward(ctx, grad):
    raise RuntimeError(
        "kt::moe_fwd is for inference and has no gradient: call ktops.moe_sft, or torch.ops.kt.moe_sft_fwd"
    )


torch.library.register_autograd("kt::moe_fwd", _backward)


def empty_output(arguments: MoeArguments) -> Tensor:
    """Returns an uninitialized output: [T, H], or [T, K, H] without reduce."""
    hidden_states = arguments.hidden_states
    shape = hidden_states.shape if arguments.reduce else (*arguments.topk_ids.shape, hidden_states.shape[1])
    return hidden_states.new_empty(shape)


def base_flops(shapes: MoeArguments) -> tuple[int, int]:
    """Returns the FLOPs of the products with gate_up_proj, 4·T·K·H·I, and with down_proj, 2·T·K·H·I.

    A multiply-add is 2 FLOPs. Without a gate, gate_up_proj is as small as down_proj. ``shapes`` holds shapes
    in place of tensors.
    """
    (_, hidden_size), (num_tokens, top_k) = shapes.hidden_states, shapes.topk_ids
    a_column = 2 * num_tokens * top_k * hidden_size
    return a_column * shapes.gate_up_rows, a_column * shapes.intermediate_size


def lora_flops(shapes: MoeArguments) -> int:
    """Returns 2·T·K·r·(H + 2I) for the adapter of gate_up_proj plus 2·T·K·r·(I + H) for that of down_proj.

    Without a gate, I takes the place of 2I.
    """
    (_, hidden_size), (num_tokens, top_k) = shapes.hidden_states, shapes.topk_ids
    flops = 0
    if shapes.gate_up_lora_A is not None:
        _, rank, _ = shapes.gate_up_lora_A
        flops += 2 * rank * (hidden_size + shapes.gate_up_rows)
    if shapes.down_lora_A is not None:
        _, rank, _ = shapes.down_lora_A
        flops += 2 * rank * (shapes.intermediate_size + hidden_size)
    return num_tokens * top_k * flops


def forward_flops(shapes: MoeArguments) -> int:
    """Returns the FLOPs of a forward: of the base weights and of both adapters."""
    return sum(base_flops(shapes)) + lora_flops(shapes)


@register_flop_formula(torch.ops.kt.moe_fwd)
def _flops(*args, out_shape=None, **kwargs) -> int:
    return forward_flops(MoeArguments(*args))
