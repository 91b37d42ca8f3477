"""kt::moe_fwd_streamed: kt::moe_fwd with the products on an accelerator, to which it copies the experts.

It has kernels for accelerators only, in ``ktops.devices``. It saves nothing and has no gradient.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ktops.ops.arguments import MoeArguments
from ktops.ops.check_devices import check_devices
from ktops.ops.moe_fwd import empty_output, forward_flops

PORTION_BYTES = 128 << 20
"""Bytes of weights that are copied at a time. A portion holds at least one expert."""


def check_min_tokens(caller: str, argument: str, value: int | None) -> None:
    """Raises ValueError, with the caller and the argument, unless the value is None or positive."""
    if value is not None and value < 1:
        raise ValueError(f"{caller}: {argument} must be positive or None, got {value}")


_ARGUMENTS = (
    str(torch.ops.kt.moe_fwd.default._schema).removeprefix("kt::moe_fwd(").removesuffix(") -> Tensor")
)

torch.library.define(
    "kt::moe_fwd_streamed",
    f"({_ARGUMENTS}, int portion_bytes) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


@torch.library.register_fake("kt::moe_fwd_streamed")
def _fake(*args) -> Tensor:
    check_devices(torch.ops.kt.moe_fwd_streamed.default, *args)
    *shared, _ = args
    return empty_output(MoeArguments(*shared))


def _backward(ctx, grad):
    raise RuntimeError("kt::moe_fwd_streamed is for inference and has no gradient: call ktops.moe_sft")


torch.library.register_autograd("kt::moe_fwd_streamed", _backward)


@register_flop_formula(torch.ops.kt.moe_fwd_streamed)
def _flops(*args, out_shape=None, **kwargs) -> int:
    *shared, _ = args
    return forward_flops(MoeArguments(*shared))
