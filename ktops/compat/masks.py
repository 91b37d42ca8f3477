"""The experts that a server keeps on its GPU: which to choose, and routes without them."""

import torch
from torch import Tensor

from ktops.devices.grouped import clamp_ids
from ktops.devices.streams import captured
from ktops.devices.transfer import PINNED

_read_by_graphs: list[Tensor] = []
"""Masks in pinned memory. A CUDA graph reads that of its layer at each launch, and may outlive the layer."""


class SkippedExperts:
    """The experts of a layer that are computed elsewhere.

    Args:
        mask: bool [E] in CPU memory.
    """

    def __init__(self, mask: Tensor) -> None:
        with torch.inference_mode(False):
            self._skipped = torch.cat([mask, mask.new_ones(1)])
        self.mask = self._skipped[:-1]
        """bool [E]; a change in place takes effect with the next call, or the next launch of a graph."""
        self._is_pinned = False

    def remove(self, ids: Tensor) -> Tensor:
        """Returns ids with -1 for these experts and unknown ones; waits for no device.

        Raises:
            RuntimeError: a CUDA graph captures the first call.
        """
        in_graph = captured(ids.device)
        if ids.device.type in PINNED and not self._is_pinned:
            self._pin(in_graph)
        if not in_graph and not self.mask.any():
            return ids
        # A copy with non_blocking reads pinned memory in stream order, and other memory before it returns.
        source = self._skipped if in_graph else self._skipped.clone()
        skipped = source.to(ids.device, non_blocking=True, copy=True)
        return ids.masked_fill(skipped[clamp_ids(ids, len(self.mask))], -1)

    def _pin(self, in_graph: bool) -> None:
        """Moves the mask to pinned memory, from which a graph can copy it."""
        if in_graph:
            raise RuntimeError("KTMoEWrapper: call the layer once before a CUDA graph captures it")
        self._skipped = self._skipped.pin_memory()
        self.mask.data = self._skipped[:-1]
        self._is_pinned = True
        _read_by_graphs.append(self._skipped)


def generate_gpu_experts_masks(activation_freq: Tensor, num_gpu_experts: int) -> Tensor:
    """Returns a mask of the experts that tokens use most, counted over all layers.

    Args:
        activation_freq: [L, E], how often each expert of each layer is used.
        num_gpu_experts: how many of all L * E experts to choose; more than that, or less than 0, mean the
            nearest possible number.

    Returns:
        bool [L, E] on the CPU.

    Raises:
        ValueError: activation_freq is not a matrix.

    Example:
        >>> generate_gpu_experts_masks(torch.tensor([[0.1, 0.5], [0.9, 0.2]]), 2)
        tensor([[False,  True],
                [ True, False]])
    """
    if activation_freq.dim() != 2:
        raise ValueError(
            "generate_gpu_experts_masks: activation_freq must have shape [num_layers, num_experts], "
            f"got {list(activation_freq.shape)}"
        )
    flat = activation_freq.cpu().flatten()
    chosen = flat.topk(min(max(num_gpu_experts, 0), len(flat))).indices
    mask = torch.zeros(len(flat), dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return mask.view(activation_freq.shape)
