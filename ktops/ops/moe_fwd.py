"""kt::moe_fwd: one MoE layer forward, nothing saved, no gradient."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def check_devices(op: torch._ops.OpOverload, *args) -> None:
    """Raises if a meta tensor stands among real ones: the dispatcher would run the fake kernel for them."""
    names = (argument.name for argument in op._schema.arguments)
    devices = {name: x.device for name, x in zip(names, args, strict=True) if isinstance(x, Tensor)}
    real = next((device for device in devices.values() if device.type != "meta"), None)
    for name, device in devices.items():
        if real is not None and device.type == "meta":
            raise RuntimeError(f"{op._schema.name}: {name} must be on {real}, got meta")


@torch.library.register_fake("kt::moe_fwd")
def _fake(hidden_states: Tensor, *args) -> Tensor:
    check_devices(torch.ops.kt.moe_fwd.default, hidden_states, *args)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _backward(ctx, grad):
    raise RuntimeError(
        "kt::moe_fwd is for inference and has no gradient: call ktops.moe_sft, or torch.ops.kt.moe_sft_fwd"
    )


torch.library.register_autograd("kt::moe_fwd", _backward)


def forward_flops(hidden_states, topk_ids, intermediate_size, gate_up_lora_A=None, down_lora_A=None) -> int:
    """2 FLOPs a multiply-add: 6·T·K·H·I for the base weights, 2·T·K·r·(H + 2I) and 2·T·K·r·(I + H) for LoRA.

    The arguments are shapes.
    """
    (_, hidden_size), (num_tokens, top_k) = hidden_states, topk_ids
    flops = 6 * hidden_size * intermediate_size
    if gate_up_lora_A is not None:
        flops += 2 * gate_up_lora_A[1] * (hidden_size + 2 * intermediate_size)
    if down_lora_A is not None:
        flops += 2 * down_lora_A[1] * (intermediate_size + hidden_size)
    return num_tokens * top_k * flops


@register_flop_formula(torch.ops.kt.moe_fwd)
def _flops(*args, out_shape=None, **kwargs) -> int:
    return forward_flops(args[0], args[1], args[16], args[11], args[13])
