"""Copies between an accelerator and CPU memory, ordered as their results are used."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ktops.devices.staging import Staging
from ktops.devices.streams import captured
from ktops.ops.memory import register_pinned

PINNED = ("cuda", "xpu")
"""The device types whose copies go through pinned memory; torch copies directly for others."""

staging = Staging()
register_pinned(staging.bytes, staging.release)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies in CPU memory, contiguous and complete. Each tensor is moved by a single copy.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if not tensors:
        return []
    device = tensors[0].device
    if device.type not in PINNED:
        return [tensor.contiguous().to("cpu") for tensor in tensors]
    if captured(device):
        raise RuntimeError(
            "ktops: a CUDA graph can capture experts only without gradients, with LoRA factors in CPU memory "
            "and where they can be computed in stream order (or else a warning says why not)"
        )
    tensors = [tensor.contiguous() for tensor in tensors]
    with ExitStack() as stack:
        blocks = [stack.enter_context(staging.block(tensor.nbytes)) for tensor in tensors]
        copies = zip(blocks, tensors, strict=True)  # after all that may fail for want of memory
        views = [block.view(tensor).copy_(tensor, non_blocking=True) for block, tensor in copies]
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
