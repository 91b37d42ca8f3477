"""Runs the operator on tensors as MoE blocks give them."""

from typing import Any

from torch import Tensor, nn

from ktops.devices.pending import moe_sft_pending
from ktops.formats import ExpertWeight
from ktops.formats.expert_weight import COMPUTE_DTYPES
from ktops.ops import moe_sft


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | ExpertWeight,
    down_proj: Tensor | ExpertWeight,
    *,
    post_expert_norm: nn.Module | None = None,
    on_device: Any = None,
    **options,
) -> Tensor:
    """Runs ``ktops.moe_sft`` in the dtype of the weights; returns a result in the dtype of hidden_states.

    The casts support autocast, under which hidden_states may have lower precision than the weights.
    hidden_states may have leading dimensions, [..., H], and so may the routes, [..., K]. Some routers of
    transformers 5.0 give a weight for every expert, [..., E]; the op takes those of the chosen ones.

    The result may be a :class:`ktops.devices.pending.PendingTensor` for tokens on a device.

    Args:
        post_expert_norm: applied to the output [T, K, H] of every route, before its routing weight.
        on_device: a DeviceExperts, which computes some of the experts.
        options: those of ``ktops.moe_sft``.
    """
    if top_k_weights.dtype not in COMPUTE_DTYPES:
        top_k_weights = top_k_weights.to(gate_up_proj.dtype)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(gate_up_proj.dtype)
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    weights = top_k_weights.reshape(-1, top_k_weights.shape[-1])
    if weights.shape[1] == gate_up_proj.shape[0] != ids.shape[1]:
        weights = weights.gather(1, ids)
    every = ids
    if on_device is not None:
        on_device.require_frozen(gate_up_proj, down_proj, options)
        ids = on_device.others(every)
    if post_expert_norm is None:
        run = moe_sft if rows.is_cpu else moe_sft_pending
        output = run(rows, ids, weights, gate_up_proj, down_proj, **options)
    else:
        routes = moe_sft(rows, ids, None, gate_up_proj, down_proj, reduce=False, **options)
        outside = (ids < 0) | (ids >= gate_up_proj.shape[0])  # whose norm need not be 0
        output = (weights.masked_fill(outside, 0)[..., None] * post_expert_norm(routes)).sum(1)
    if on_device is not None:
        output = output + on_device(rows, every, weights, post_expert_norm=post_expert_norm, **options)
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)
