"""Combines separate adapters of gate and up into the joint adapter that kt::moe_sft expects.

    [g | u] += s x [A_gate; A_up]^T [[B_gate, 0], [0, B_up]]^T

With E experts, H hidden_size, I intermediate_size, r rank: A_gate, A_up [E, r, H]; B_gate, B_up [E, I, r].
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


def shapes(num_experts: int, hidden_size: int, intermediate_size: int, rank: int) -> dict[str, list[int]]:
    """Returns the shape of each adapter tensor by name."""
    first, second = [num_experts, rank, hidden_size], [num_experts, intermediate_size, rank]
    down = [num_experts, rank, intermediate_size], [num_experts, hidden_size, rank]
    return dict(zip(NAMES, (first, second, first, second, *down), strict=True))


def join(gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (A [E, 2r, H], B [E, 2I, 2r]), as differentiable functions of the four tensors."""
    rank = gate_b.shape[2]
    joint_b = torch.cat([F.pad(gate_b, (0, rank)), F.pad(up_b, (rank, 0))], dim=1)
    return torch.cat([gate_a, up_a], dim=1), joint_b


def arguments(adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor | float]:
    """Returns the LoRA arguments of :func:`ktops.moe_sft` for the six adapter tensors by name."""
    gate_a, gate_b, up_a, up_b, down_a, down_b = (adapters[name] for name in NAMES)
    joint_a, joint_b = join(gate_a, gate_b, up_a, up_b)
    return {
        "gate_up_lora_A": joint_a,
        "gate_up_lora_B": joint_b,
        "gate_up_scaling": scaling,
        "down_lora_A": down_a,
        "down_lora_B": down_b,
        "down_scaling": scaling,
    }


def split(joint_a: Tensor, joint_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns views (gate_a, gate_b, up_a, up_b) of the blocks of a joint adapter, or of its gradient."""
    rank, rows = joint_a.shape[1] // 2, joint_b.shape[1] // 2
    return joint_a[:, :rank], joint_b[:, :rows, :rank], joint_a[:, rank:], joint_b[:, rows:, rank:]
