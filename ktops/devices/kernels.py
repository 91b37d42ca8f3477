"""The Mixture-of-Experts operators for tensors on an accelerator.

The tokens are copied to CPU memory, where the experts are, and the result is copied back. A call moves
hidden_states [T, H], topk_ids and topk_weights [T, K] down and the output [T, H] up; backward moves
grad_output down and the gradients of hidden_states and topk_weights up. Forward returns its copies in CPU
memory, and autograd saves those.
"""

import torch
from torch import Tensor

from ktops.devices import pending, streams
from ktops.devices.transfer import download, upload
from ktops.ops.arguments import GRADIENTS, MoeArguments
from ktops.ops.check_devices import LORA, TOKENS, check_devices

BACKENDS = ("cuda", "xpu", "privateuseone")
"""The accelerators, by the names that torch.library takes."""

_FROM_DEVICE = ("hidden_states", "topk_weights")
"""The arguments whose gradients go to the device of grad_output."""


def in_host_memory(arguments: MoeArguments) -> MoeArguments:
    """Returns the arguments with copies in CPU memory in place of tensors on another device."""
    values = arguments._asdict()
    moved = [name for name in (*TOKENS, *LORA) if values[name] is not None and not values[name].is_cpu]
    copies = download([values[name] for name in moved])
    return MoeArguments(**values | dict(zip(moved, copies, strict=True)))


def moe_fwd(*args) -> Tensor:
    """``kt::moe_fwd`` with hidden_states on an accelerator."""
    check_devices(torch.ops.kt.moe_fwd.default, *args)
    arguments = MoeArguments(*args)
    lora = (getattr(arguments, name) for name in LORA)
    if streams.available(arguments.hidden_states.device.type) and all(x is None or x.is_cpu for x in lora):
        return pending.output(streams.begin(arguments))
    return upload(torch.ops.kt.moe_fwd(*in_host_memory(arguments)), arguments.hidden_states.device)


def moe_sft_fwd(*args) -> tuple[Tensor, ...]:
    """``kt::moe_sft_fwd`` with hidden_states on an accelerator."""
    check_devices(torch.ops.kt.moe_sft_fwd.default, *args)
    *shared, save = args
    arguments = MoeArguments(*shared)
    host = in_host_memory(arguments)
    output, gate_up, xa, ha, *_ = torch.ops.kt.moe_sft_fwd(*host, save)
    output = upload(output, arguments.hidden_states.device)
    return output, gate_up, xa, ha, host.hidden_states, host.topk_ids, host.topk_weights


def moe_sft_bwd(*args) -> tuple[Tensor | None, ...]:
    """``kt::moe_sft_bwd`` with grad_output on an accelerator."""
    check_devices(torch.ops.kt.moe_sft_bwd.default, *args)
    grad_output, *shared = args
    arguments, rest = MoeArguments(*shared[: len(MoeArguments._fields)]), shared[len(MoeArguments._fields) :]
    (grad_on_host,) = download([grad_output])
    gradients = torch.ops.kt.moe_sft_bwd(grad_on_host, *in_host_memory(arguments), *rest)
    return tuple(
        None if gradient is None else upload(gradient, _device_of_gradient(name, arguments, grad_output))
        for name, gradient in zip(GRADIENTS, gradients, strict=True)
    )


def _device_of_gradient(name: str, arguments: MoeArguments, grad_output: Tensor) -> torch.device:
    return grad_output.device if name in _FROM_DEVICE else getattr(arguments, name).device


for _kernel in (moe_fwd, moe_sft_fwd, moe_sft_bwd):
    torch.library.impl(f"kt::{_kernel.__name__}", BACKENDS)(_kernel)
    # Inductor would capture the operators because of their outputs, but training waits for the device, and
    # experts that are not parameters would be copied before every launch. C++ can give tags since torch 2.12.
    getattr(torch.ops.kt, _kernel.__name__).default.tags.append(torch.Tag.cudagraph_unsafe)
