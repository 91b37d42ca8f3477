"""Copies between an accelerator and CPU memory, ordered as their results are used."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ktops.devices.staging import Staging
from ktops.ops.memory import register_pinned

PINNED = ("cuda", "xpu")
"""The device types whose copies go through pinned memory; torch copies directly for others."""

staging = Staging()
register_pinned(staging.bytes, staging.release)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies in CPU memory, contiguous and complete. Each tensor is moved by a single copy."""
    if not tensors:
        return []
    device = tensors[0].device
    if device.type not in PINNED:
        return [tensor.contiguous().to("cpu") for tensor in tensors]
    with ExitStack() as stack:
        views = []
        for tensor in tensors:
            block = stack.enter_context(staging.block(tensor.nbytes))
            views.append(block.view(tensor))
            views[-1].copy_(tensor.contiguous(), non_blocking=True)
        recorded(device).synchronize()
        return [view.clone() for view in views]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a copy on the device, complete for what its current stream does next."""
    if device.type == tensor.device.type:
        return tensor
    if device.type not in PINNED:
        return tensor.to(device)
    result = torch.empty_like(tensor, device=device)
    with staging.block(tensor.nbytes) as block:
        result.copy_(block.view(tensor).copy_(tensor), non_blocking=True)
        block.free_after = recorded(device)
    return result


def recorded(device: torch.device) -> torch.Event:
    """Returns an event at this point of the device's current stream."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event
