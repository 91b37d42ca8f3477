"""Chooses the experts that a server keeps on the GPU."""

import torch
from torch import Tensor


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
