"""kt::moe_sft_fwd, kt::moe_sft_bwd and kt::moe_fwd in plain PyTorch.

The arguments are those of the operators, with the shared ones in a :class:`ktops.ops.arguments.MoeArguments`.
T tokens, K = top_k, E experts, H hidden_size, I intermediate_size, r LoRA rank.
For token t and slot j, with e = topk_ids[t, j]:

    [g | u] = x Wgu[e]^T + bgu[e] + s1 (x A1[e]^T) B1[e]^T
    h       = act(g) * u, or another function of g and u
    y       = h Wd[e]^T + bd[e] + s2 (h A2[e]^T) B2[e]^T
    out[t] += topk_weights[t, j] * y

Everything is computed in the dtype of hidden_states; pass float64 for the reference of a test. ``compute``
changes nothing here, because products use the decoded weights. :mod:`ktops.reference.int8` describes how
"int8" rounds the rows of hidden_states and h. The columns of [g | u] are in the order of gate_up_proj's rows.
Without a gate there are I of them instead of 2I, and h = act(g).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ktops.formats import Codes, get_format
from ktops.ops.activation import gate
from ktops.ops.arguments import GRADIENTS, MoeArguments


def sort_routes(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns the routes (t*K + j) sorted by expert, then by route, and expert_offsets [E+1] into that order.

    Routes whose id is outside [0, E) are left out.
    """
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    return order[: int(offsets[-1])], offsets


def _lora(
    x: Tensor, a: Tensor | None, b: Tensor | None, scaling: float
) -> tuple[Tensor | float, Tensor | None]:
    """Returns (s (x A^T) B^T, x A^T) for one expert."""
    if a is None or b is None:
        return 0.0, None
    xa = x @ a.T
    return scaling * (xa @ b.T), xa


def with_dense_weights(arguments: MoeArguments) -> MoeArguments:
    """Returns the arguments with gate_up_proj [E, 2I, H] and down_proj [E, H, I] decoded to floats."""
    a, hidden_size = arguments, arguments.hidden_states.shape[1]
    gate_up = Codes(a.gate_up_proj, a.gate_up_scale, a.gate_up_zero)
    down = Codes(a.down_proj, a.down_scale, a.down_zero)
    return a._replace(
        gate_up_proj=_dense(gate_up, a.gate_up_format, hidden_size, a.gate_up_group_size),
        down_proj=_dense(down, a.down_format, a.intermediate_size, a.down_group_size),
    )


def _dense(codes: Codes, name: str, columns: int, group_size: int) -> Tensor:
    return codes.weight if name == "dense" else get_format(name).dequantize(codes, columns, group_size)


def _gate(arguments: MoeArguments, gate_up: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return gate(arguments.activation, arguments.activation_args, arguments.gating, gate_up)


def _at(tensor: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor[expert].to(dtype)


def moe_sft_fwd(arguments: MoeArguments, save: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (output [T, H] or [T, K, H], saved_gate_up [T*K, 2I], saved_xa [T*K, r1], saved_ha [T*K, r2]).

    The saved tensors hold one row per position, in the order of :func:`sort_routes`. Rows beyond the last
    valid route are unspecified (zero here). ``save="recompute"`` returns saved_gate_up as [0, 2I].
    """
    a = with_dense_weights(arguments)
    hidden_states, dtype = a.hidden_states, a.hidden_states.dtype
    (num_tokens, hidden_size), top_k = hidden_states.shape, a.topk_ids.shape[1]
    routes, offsets = sort_routes(a.topk_ids, a.num_experts)
    rank1 = 0 if a.gate_up_lora_A is None else a.gate_up_lora_A.shape[1]
    rank2 = 0 if a.down_lora_A is None else a.down_lora_A.shape[1]

    output = hidden_states.new_zeros(num_tokens if a.reduce else num_tokens * top_k, hidden_size)
    saved_gate_up = hidden_states.new_zeros(num_tokens * top_k, a.gate_up_rows)
    saved_xa = hidden_states.new_zeros(num_tokens * top_k, rank1)
    saved_ha = hidden_states.new_zeros(num_tokens * top_k, rank2)
    for e in range(a.num_experts):
        span = slice(int(offsets[e]), int(offsets[e + 1]))
        if span.start == span.stop:
            continue
        tokens = routes[span] // top_k
        w = a.topk_weights.reshape(-1)[routes[span]].to(dtype)
        x = hidden_states[tokens]

        A1, B1 = _at(a.gate_up_lora_A, e, dtype), _at(a.gate_up_lora_B, e, dtype)
        low_rank, xa = _lora(x, A1, B1, a.gate_up_scaling)
        gate_up = x @ a.gate_up_proj[e].to(dtype).T + low_rank
        if a.gate_up_bias is not None:
            gate_up = gate_up + a.gate_up_bias[e].to(dtype)
        h, _ = _gate(a, gate_up)

        A2, B2 = _at(a.down_lora_A, e, dtype), _at(a.down_lora_B, e, dtype)
        low_rank, ha = _lora(h, A2, B2, a.down_scaling)
        y = h @ a.down_proj[e].to(dtype).T + low_rank
        if a.down_bias is not None:
            y = y + a.down_bias[e].to(dtype)
        if a.reduce:
            output.index_add_(0, tokens, w[:, None] * y)
        else:
            output[routes[span]] = y

        saved_gate_up[span] = gate_up
        if xa is not None:
            saved_xa[span] = xa
        if ha is not None:
            saved_ha[span] = ha
    if save == "recompute":
        saved_gate_up = hidden_states.new_zeros(0, a.gate_up_rows)
    if not a.reduce:
        output = output.unflatten(0, (num_tokens, top_k))
    return output, saved_gate_up, saved_xa, saved_ha


def moe_fwd(arguments: MoeArguments) -> Tensor:
    """Returns only the output of :func:`moe_sft_fwd`."""
    return moe_sft_fwd(arguments, "recompute")[0]


def moe_sft_bwd(
    grad_output: Tensor,
    arguments: MoeArguments,
    save: str,
    saved_gate_up: Tensor,
    saved_xa: Tensor,
    saved_ha: Tensor,
    grad_mask: int,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients in the order of ``ktops.ops.arguments.GRADIENTS``; None if not in grad_mask.

    With d = grad_output[t] and w = topk_weights[t, j], or d = grad_output[t, j] and w = 1 without reduce,
    where dh is unweighted until grad_w has been taken::

        dh = d Wd + s2 (d B2) A2            grad_w = <h, dh> + <d, bd>
        [dg | du] = (∂h/∂g, ∂h/∂u) * (w dh)
        dx[t] += [dg|du] Wgu + s1 ([dg|du] B1) A1
        dB1 = s1 [dg|du]^T xa     dA1 = s1 ([dg|du] B1)^T x     dWgu = [dg|du]^T x     dbgu = sum [dg|du]
        dB2 = s2 (w d)^T ha       dA2 = s2 (w d B2)^T h         dWd = (w d)^T h        dbd = sum w d
    """
    a = with_dense_weights(arguments)
    dtype, top_k = a.hidden_states.dtype, a.topk_ids.shape[1]
    routes, offsets = sort_routes(a.topk_ids, a.num_experts)

    def zeros(name: str) -> Tensor | None:
        tensor, asked = getattr(a, name), grad_mask >> GRADIENTS.index(name) & 1
        return tensor.new_zeros(tensor.shape) if tensor is not None and asked else None

    grads = tuple(zeros(name) for name in GRADIENTS)
    dx, dw, dWgu, dWd, dbgu, dbd, dA1, dB1, dA2, dB2 = grads

    def put(grad: Tensor | None, expert: int, value) -> None:
        if grad is not None:
            grad[expert] = value().to(grad.dtype)

    for e in range(a.num_experts):
        span = slice(int(offsets[e]), int(offsets[e + 1]))
        if span.start == span.stop:
            continue
        tokens = routes[span] // top_k
        w = a.topk_weights.reshape(-1)[routes[span]].to(dtype)[:, None]
        x, d = a.hidden_states[tokens], grad_output[tokens].to(dtype)
        if not a.reduce:
            w, d = torch.ones_like(w), grad_output.flatten(0, 1)[routes[span]].to(dtype)
        A1, B1 = _at(a.gate_up_lora_A, e, dtype), _at(a.gate_up_lora_B, e, dtype)
        A2, B2 = _at(a.down_lora_A, e, dtype), _at(a.down_lora_B, e, dtype)
        bgu, bd = _at(a.gate_up_bias, e, dtype), _at(a.down_bias, e, dtype)
        low_rank, xa = _lora(x, A1, B1, a.gate_up_scaling)
        if save == "recompute":
            gate_up = x @ a.gate_up_proj[e].to(dtype).T + low_rank + (0 if bgu is None else bgu)
        else:
            gate_up = saved_gate_up[span]
        h, gate_backward = _gate(a, gate_up)

        dh = d @ a.down_proj[e].to(dtype)
        if A2 is not None and B2 is not None:
            dh = dh + a.down_scaling * (d @ B2) @ A2
        if dw is not None and a.reduce:
            grad_w = (h * dh).sum(1) + (0 if bd is None else d @ bd)
            dw.view(-1)[routes[span]] = grad_w.to(dw.dtype)
        dgu = gate_backward(w * dh)

        if dx is not None:
            dx_e = dgu @ a.gate_up_proj[e].to(dtype)
            if A1 is not None and B1 is not None:
                dx_e = dx_e + a.gate_up_scaling * (dgu @ B1) @ A1
            dx.index_add_(0, tokens, dx_e)
        put(dWgu, e, lambda dgu=dgu, x=x: dgu.T @ x)
        put(dbgu, e, lambda dgu=dgu: dgu.sum(0))
        put(dA1, e, lambda dgu=dgu, x=x, B1=B1: a.gate_up_scaling * (dgu @ B1).T @ x)
        put(dB1, e, lambda dgu=dgu, xa=xa: a.gate_up_scaling * dgu.T @ xa)
        wd = w * d
        put(dWd, e, lambda wd=wd, h=h: wd.T @ h)
        put(dbd, e, lambda wd=wd: wd.sum(0))
        put(dA2, e, lambda wd=wd, h=h, B2=B2: a.down_scaling * (wd @ B2).T @ h)
        put(dB2, e, lambda wd=wd, h=h, A2=A2: a.down_scaling * wd.T @ (h @ A2.T))
    return grads
