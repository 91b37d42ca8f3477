"""Where the tensors of a Mixture-of-Experts operator must be."""

import torch
from torch import Tensor

ROUTES = ("topk_ids", "topk_weights")
"""Arguments of forward that must be on the device of hidden_states."""

TOKENS = ("hidden_states", *ROUTES)
"""Arguments that describe the tokens of a call; all others belong to the experts."""

LORA = ("gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B")
"""Arguments that may be on the device of the call or in CPU memory, in backward as well as in forward."""


def check_devices(op: torch._ops.OpOverload, *args) -> None:
    """Raises RuntimeError unless every tensor is where the operator needs it.

    The device of a call is that of hidden_states, in backward that of grad_output. The experts themselves are
    in CPU memory. On the meta device, all tensors must be.
    """
    names = (argument.name for argument in op._schema.arguments)
    devices = {name: x.device for name, x in zip(names, args, strict=True) if isinstance(x, Tensor)}
    if any(device.type == "meta" for device in devices.values()):
        _require_all_meta(op, devices)
        return
    is_backward = "grad_output" in devices
    first = "grad_output" if is_backward else "hidden_states"
    own, cpu = devices.pop(first), torch.device("cpu")
    either = (*TOKENS, *LORA) if is_backward else LORA
    for name, device in devices.items():
        allowed = [cpu, own] if name in either else [own] if name in ROUTES else [cpu]
        if device not in allowed:
            places = " or ".join(dict.fromkeys(map(str, allowed)))
            experts = name not in (*TOKENS, *LORA)
            advice = ". Move models by ktops.offload_experts, which leaves experts there" if experts else ""
            raise RuntimeError(
                f"{op._schema.name}: {name} must be on {places} ({first} is on {own}), got {device}{advice}"
            )


def _require_all_meta(op: torch._ops.OpOverload, devices: dict[str, torch.device]) -> None:
    real = next((device for device in devices.values() if device.type != "meta"), None)
    for name, device in devices.items():
        if real is not None and device.type == "meta":
            raise RuntimeError(f"{op._schema.name}: {name} must be on {real}, got meta")
