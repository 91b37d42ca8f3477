"""Copies of some experts of a layer on an accelerator, which computes their share of the layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktops.devices.grouped import ALIGNMENT, clamp_ids
from ktops.formats import ExpertWeight
from ktops.nn.host_memory import ON_DEVICE
from ktops.nn.layout import Layout
from ktops.ops.activation import ExpertFunction, gate

RANK_MULTIPLE = ALIGNMENT // 2
"""Factors are padded to such ranks, whose rows are aligned in every dtype that the op supports."""


class DeviceExperts(nn.Module):
    """Computes the share of the chosen experts in the output of their layer.

    The operator computes the other experts of the same tokens. The weights are copies; those in CPU memory
    stay, and with them state dicts, files and merged adapters. After a change there, :meth:`copy_from` copies
    them again.

    Args:
        chosen: bool [E], at least one of them.
        layout: what the experts compute.
        device: an accelerator.
    """

    slots: Tensor
    """[E + 1], each expert's place among the chosen ones, G for others; the last for ids outside [0, E)."""

    every_slot: Tensor
    """[G], 0 to G - 1."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, chosen: Tensor, layout: Layout, device: torch.device) -> None:
        super().__init__()
        self.experts: list[int] = chosen.nonzero().flatten().tolist()
        self.layout = layout
        slots = torch.full((len(chosen) + 1,), len(self.experts), device="cpu")
        every_slot = torch.arange(len(self.experts), device="cpu")
        slots[self.experts] = every_slot
        self._set("slots", slots.to(device))
        self._set("every_slot", every_slot.to(device))

    def _set(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def copy_from(self, experts: nn.Module) -> None:
        """Copies the weights and biases of the chosen experts of a layer; those in a format are decoded."""
        device = self.slots.device
        gate_up, down = self.layout.weights(experts)
        gate_up_bias, down_bias = self.layout.biases(experts)
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            self._set(name, _dense(weight, self.experts).to(device))
        for name, bias in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
            self._set(name, None if bias is None else bias[self.experts].to(device))

    def require_frozen(self, gate_up_proj: Any, down_proj: Any, options: dict[str, Any]) -> None:
        """Raises RuntimeError if gradients of the experts themselves are needed, which copies do not have."""
        given = gate_up_proj, down_proj, options.get("gate_up_bias"), options.get("down_bias")
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
            raise RuntimeError(
                f"ktops: experts with copies on {self.slots.device} (num_gpu_experts) cannot be trained, "
                "only adapters on them: call requires_grad_(False) on the experts' weights"
            )

    def slots_of(self, ids: Tensor) -> Tensor:
        """Returns the slots of ids [T, K], G for experts that are not here."""
        return self.slots[clamp_ids(ids, len(self.slots) - 1)]

    def others(self, ids: Tensor) -> Tensor:
        """Returns ids [T, K] with -1 in place of experts that are here."""
        return ids.masked_fill(self.slots_of(ids) < len(self.experts), -1)

    def forward(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        post_expert_norm: nn.Module | None = None,
        activation: str,
        activation_args: tuple[float, ...],
        gating: str,
        **options: Any,
    ) -> Tensor:
        """Returns the share of the chosen experts, [T, H] in float32.

        Args:
            rows, ids, weights: [T, H], [T, K], [T, K], on the device.
            post_expert_norm: as in :func:`ktops.nn.experts.run_experts`.
            activation, activation_args, gating, options: those of :func:`ktops.moe_sft`, for all E experts.
        """
        if not ids.numel():
            return torch.zeros_like(rows, dtype=torch.float32)
        function = ExpertFunction(activation, activation_args, gating)
        slots, order = self.slots_of(ids).flatten().sort(stable=True)
        ends = torch.searchsorted(slots, self.every_slot, right=True)
        absent = (slots == len(self.experts))[:, None]
        groups = _Groups(slots.clamp(max=len(self.experts) - 1), ends.int())
        # grouped_mm leaves rows of absent experts undefined, in forward and in backward
        x = rows[order // ids.shape[1]].masked_fill(absent, 0)
        gate_up = self._project(x, "gate_up", groups, options)
        h, _ = gate(*function, gate_up)
        y = self._project(h.to(rows.dtype), "down", groups, options).masked_fill(absent, 0)
        if post_expert_norm is not None:
            y = post_expert_norm(y).masked_fill(absent, 0)
        y = y[order.argsort()].view(*ids.shape, -1)
        return (y.float() * weights[..., None].float()).sum(1)

    def _project(self, rows: Tensor, prefix: str, groups: "_Groups", lora: dict[str, Any]) -> Tensor:
        """Returns x W^T + b + s (x A^T) B^T for rows sorted by slot."""
        product = groups.multiply(rows, getattr(self, f"{prefix}_proj"))
        bias = getattr(self, f"{prefix}_bias")
        if bias is not None:
            product = product + bias[groups.slots].to(product.dtype)
        a, b = (lora.get(f"{prefix}_lora_{factor}") for factor in "AB")
        if a is not None and b is not None:
            a, b = (factor[self.experts].to(rows.device, rows.dtype) for factor in (a, b))
            padding = -a.shape[1] % RANK_MULTIPLE
            low_rank = groups.multiply(rows, F.pad(a, (0, 0, 0, padding)))
            delta = groups.multiply(low_rank, F.pad(b, (0, padding)))
            product = product + lora[f"{prefix}_scaling"] * delta
        return product


class _Groups(NamedTuple):
    """Rows sorted by slot.

    Attributes:
        slots: [S], of each row.
        ends: [G], int32, the end of each slot's rows.
    """

    slots: Tensor
    ends: Tensor

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiplies each row by its slot's weight, [S, K], [G, N, K] -> [S, N]."""
        return F.grouped_mm(rows, weight.mT, offs=self.ends)


def copy_to_device(experts: nn.Module, chosen: Tensor, layout: Layout, device: torch.device) -> None:
    """Copies the chosen experts of a layer, bool [E], to a device; without any, removes earlier copies."""
    experts._modules.pop(ON_DEVICE, None)
    if not chosen.any():
        return
    copies = DeviceExperts(chosen, layout, device)
    copies.copy_from(experts)
    experts.add_module(ON_DEVICE, copies)
    if _copy_again not in experts._load_state_dict_post_hooks.values():
        experts.register_load_state_dict_post_hook(_copy_again)


def _copy_again(experts: nn.Module, _: object) -> None:
    refresh(experts)


def refresh(experts: nn.Module) -> None:
    """Copies the experts of a layer that are on a device again, because their weights have changed."""
    copies = experts._modules.get(ON_DEVICE)
    if copies is not None:
        assert isinstance(copies, DeviceExperts)
        copies.copy_from(experts)


def _dense(weight: Tensor | ExpertWeight, experts: list[int]) -> Tensor:
    """Returns dense weights [G, N, K] of some experts."""
    if not isinstance(weight, ExpertWeight):
        return weight[experts].contiguous()
    codes = weight.codes.map(lambda tensor: tensor[experts])
    return ExpertWeight(
        weight.format,
        (len(experts), *weight.shape[1:]),
        *codes,
        group_size=weight.group_size,
        dtype=weight.dtype,
    ).dequantize()
