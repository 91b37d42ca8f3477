"""kt::moe_sft_fwd and kt::moe_sft_bwd: one MoE layer, differentiable."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import register_flop_formula

from ktops.formats.expert_weight import ExpertWeight
from ktops.ops.activation import activation_arguments
from ktops.ops.arguments import ATTRIBUTES, FORWARD, GRADIENTS, TENSORS, MoeArguments, pick
from ktops.ops.check_devices import check_devices
from ktops.ops.moe_fwd import base_flops, empty_output, forward_flops, lora_flops
from ktops.ops.moe_fwd_streamed import PORTION_BYTES, check_min_tokens

_tensors = pick(*TENSORS)
_attributes = pick(*ATTRIBUTES)
_differentiable = pick(*GRADIENTS)
_DENSE = (None, None, "dense", 0)
_WEIGHTS = ("gate_up_proj", "down_proj")
_NO_GRADIENTS = dict.fromkeys(FORWARD)


@torch.library.register_fake("kt::moe_sft_fwd")
def _forward_fake(*args) -> tuple[Tensor | None, ...]:
    check_devices(torch.ops.kt.moe_sft_fwd.default, *args)
    *shared, save = args
    arguments = MoeArguments(*shared)
    tokens = arguments.hidden_states, arguments.topk_ids, arguments.topk_weights
    hidden_states, (num_tokens, top_k) = arguments.hidden_states, arguments.topk_ids.shape
    num_routes, host = num_tokens * top_k, arguments.gate_up_proj.device

    def saved(rows: int, columns: int) -> Tensor:
        return hidden_states.new_empty(rows, columns, device=host)

    def rank(lora_a: Tensor | None) -> int:
        return 0 if lora_a is None else lora_a.shape[1]

    return (
        empty_output(arguments),
        saved(0 if save == "recompute" else num_routes, arguments.gate_up_rows),
        saved(num_routes, rank(arguments.gate_up_lora_A)),
        saved(num_routes, rank(arguments.down_lora_A)),
        *(None if x.device == host else x.new_empty(x.shape, device=host) for x in tokens),
    )


@torch.library.register_fake("kt::moe_sft_bwd")
def _backward_fake(*args) -> tuple[Tensor | None, ...]:
    check_devices(torch.ops.kt.moe_sft_bwd.default, *args)
    grad_output, *shared, _, _, _, _, grad_mask = args
    return tuple(
        _gradient_like(name, tensor, grad_output) if grad_mask >> bit & 1 else None
        for bit, (name, tensor) in enumerate(zip(GRADIENTS, _differentiable(shared), strict=True))
    )


def _gradient_like(name: str, tensor: Tensor, grad_output: Tensor) -> Tensor:
    if name in ("hidden_states", "topk_weights"):
        return grad_output.new_empty(tensor.shape, dtype=tensor.dtype)
    if name in _WEIGHTS and tensor.stride(1) == 1 and tensor.stride(2) != 1:
        return torch.empty_like(tensor.mT, memory_format=torch.contiguous_format).mT
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, gate_up, xa, ha, *host = output
    if host[0] is None:
        host = []
    ctx.mark_non_differentiable(gate_up, xa, ha, *host)
    ctx.save_for_backward(*host, *_tensors(inputs)[len(host) :], gate_up, xa, ha)
    ctx.attributes = _attributes(inputs)


def _backward(ctx, grad_output: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    grads = _NO_GRADIENTS.copy()
    if grad_output is not None:
        *tensors, gate_up, xa, ha = ctx.saved_tensors
        grad_mask = sum(need << bit for bit, need in enumerate(_differentiable(ctx.needs_input_grad)))
        results = torch.ops.kt.moe_sft_bwd(grad_output, *tensors, *ctx.attributes, gate_up, xa, ha, grad_mask)
        grads.update(zip(GRADIENTS, results, strict=True))
    return tuple(grads.values())


def _double_backward(ctx, *_):
    raise RuntimeError("kt::moe_sft_bwd has no derivative: ktops does not support double backward")


torch.library.register_autograd("kt::moe_sft_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("kt::moe_sft_bwd", _double_backward)


@register_flop_formula(torch.ops.kt.moe_sft_fwd)
def _forward_flops(*args, out_shape=None, **kwargs) -> int:
    *shared, _ = args
    return forward_flops(MoeArguments(*shared))


@register_flop_formula(torch.ops.kt.moe_sft_bwd)
def _backward_flops(*args, out_shape=None, **kwargs) -> int:
    """Counts each gradient of a product, with respect to its input or its weight, as much as the product."""
    _, *shared, save, _, _, _, grad_mask = args
    shapes = MoeArguments(*shared)
    asked = {name for bit, name in enumerate(GRADIENTS) if grad_mask >> bit & 1}
    (gate_up, down), lora = base_flops(shapes), lora_flops(shapes)
    flops = gate_up + down + lora
    flops += lora if asked & {"gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B"} else 0
    flops += gate_up if "gate_up_proj" in asked else 0
    flops += down if "down_proj" in asked else 0
    return flops + (gate_up if save == "recompute" else 0)


def in_format(weight: Tensor | ExpertWeight) -> tuple[Tensor, Tensor | None, Tensor | None, str, int]:
    """Returns (weight, scale, zero, format, group_size), the operators' arguments for one projection."""
    if not isinstance(weight, ExpertWeight):
        return weight, *_DENSE
    return *weight.codes, weight.format, weight.group_size


def _no_weights(hidden_states: Tensor, topk_ids: Tensor, reduce: bool) -> Tensor:
    if reduce:
        raise RuntimeError("ktops.moe_sft: topk_weights must be a tensor with reduce=True, got None")
    return hidden_states.new_ones(()).expand(topk_ids.shape)


def moe_sft(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    gate_up_proj: Tensor | ExpertWeight,
    down_proj: Tensor | ExpertWeight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_lora_A: Tensor | None = None,
    gate_up_lora_B: Tensor | None = None,
    down_lora_A: Tensor | None = None,
    down_lora_B: Tensor | None = None,
    gate_up_scaling: float = 1.0,
    down_scaling: float = 1.0,
    activation: str = "silu",
    activation_args: Sequence[float] | Mapping[str, float] = (),
    gating: str = "concatenated",
    reduce: bool = True,
    save: str = "activations",
    compute: str = "auto",
    stream_min_tokens: int | None = None,
) -> Tensor:
    """Computes the routed experts of a Mixture-of-Experts layer, in CPU memory, with optional LoRA.

    Differentiable. T tokens, K = top_k, E experts, H hidden_size, I intermediate_size, r LoRA rank. For token
    t and slot j, with e = topk_ids[t, j]::

        [g | u] = x Wgu[e]^T + bgu[e] + s1 (x A1[e]^T) B1[e]^T
        h       = act(g) * u, or another function of g and u
        y       = h Wd[e]^T + bd[e] + s2 (h A2[e]^T) B2[e]^T
        out[t] += topk_weights[t, j] * y

    LoRA follows PEFT's form for fused experts (one A for gate and up). Sums are accumulated in float32
    (float64 for float64 inputs) and rounded once. The result does not depend on the number of threads.

    Args:
        hidden_states: [T, H], float32, bfloat16, float16 or float64.
        topk_ids: [T, K], int32 or int64. Routes with ids outside [0, E) contribute nothing.
        topk_weights: [T, K], any of the four dtypes. Not used, and may be None, with ``reduce=False``.
        gate_up_proj: [E, 2I, H] in the dtype of hidden_states, or a :class:`ktops.ExpertWeight`.
        down_proj: [E, H, I] in the dtype of hidden_states, or a :class:`ktops.ExpertWeight`.
        gate_up_bias, down_bias: [E, 2I] and [E, H].
        gate_up_lora_A, gate_up_lora_B: [E, r, H] and [E, 2I, r]; both or neither.
        down_lora_A, down_lora_B: [E, r, I] and [E, H, r]; both or neither. The rank may differ from that of
            gate_up.
        gate_up_scaling, down_scaling: s1 and s2, usually lora_alpha / r.
        activation, activation_args: a name from the table of activations in ``docs/ops.md``, and its
            parameters: all of them in order, or by name, ``{"limit": 7.0, "alpha": 1.702, "offset": 1.0}``.
        gating: the order of the rows in each expert's gate_up_proj. "concatenated": the I gate rows, then the
            I up rows. "interleaved": gate and up rows alternate, gate first, as in gpt-oss. "none": there is
            no gate, gate_up_proj is [E, I, H], and h = act(x W^T). Everything else with 2I rows or columns
            follows the same order: gate_up_bias, gate_up_lora_B, their gradients.
        reduce: whether to sum the routes of each token, weighted. If False, the result holds y of every
            route, without its routing weight; zeros if its id is outside [0, E).
        save: what to keep for backward. "activations" keeps [g | u] of every route. "recompute" keeps
            2·T·K·I fewer elements and repeats the gate_up product in backward.
        compute: how to compute products with weights in a format. "bf16" decodes the weights to the dtype
            of hidden_states. "int8" (formats with integer codes) also rounds activations to int8, in blocks
            of 32 columns with a scale each, and multiplies integers. "auto" uses "int8" if no gradient is
            required and the kernels are faster with it, otherwise "bf16".
        stream_min_tokens: the number of tokens from which experts are copied to the accelerator that
            hidden_states is on, and computed there with decoded weights, if no gradient is required. None:
            always on the CPU. Without effect if hidden_states is on the CPU. ``docs/devices.md`` says when
            it is faster.

    Returns:
        [T, H], or [T, K, H] with ``reduce=False``, in the dtype of hidden_states.

    Raises:
        RuntimeError: if an argument has the wrong shape, dtype, device or value. The message names it.
        ValueError: stream_min_tokens is not positive.

    hidden_states may be on an accelerator, with topk_ids and topk_weights; the result and their gradients are
    there, too. All other tensors must be in CPU memory, but LoRA tensors may also be on that device.

    Tensors may have any strides. Weights stored as [E, in, out] are given as views, ``weight.mT``; their
    gradients have the same layout. Biases and LoRA tensors may have any of the four dtypes. Each gradient
    has the dtype of its tensor. If no tensor requires a gradient, this calls kt::moe_fwd and saves nothing.
    torch.func.grad and double backward are not supported.

    Example:
        >>> T, K, E, H, I = 4, 2, 8, 64, 32
        >>> x = torch.randn(T, H, requires_grad=True)
        >>> ids = torch.randint(E, (T, K))
        >>> w = torch.full((T, K), 1 / K)
        >>> y = ktops.moe_sft(x, ids, w, torch.randn(E, 2 * I, H), torch.randn(E, H, I))
        >>> y.sum().backward()
    """
    if stream_min_tokens is not None:
        check_min_tokens("moe_sft", "stream_min_tokens", stream_min_tokens)
    if topk_weights is None:
        topk_weights = _no_weights(hidden_states, topk_ids, reduce)
    gate_up, gate_up_scale, gate_up_zero, gate_up_format, gate_up_group_size = gate_up_proj, *_DENSE
    if isinstance(gate_up_proj, ExpertWeight):
        gate_up, gate_up_scale, gate_up_zero, gate_up_format, gate_up_group_size = in_format(gate_up_proj)
    down, down_scale, down_zero, down_format, down_group_size = down_proj, *_DENSE
    if isinstance(down_proj, ExpertWeight):
        down, down_scale, down_zero, down_format, down_group_size = in_format(down_proj)
    if not isinstance(activation_args, (tuple, list)):
        activation_args = activation_arguments(activation, activation_args)
    # In the order of MoeArguments, whose constructor would make a small call a tenth slower.
    arguments = (
        hidden_states, topk_ids, topk_weights, gate_up, down,
        gate_up_scale, gate_up_zero, down_scale, down_zero, gate_up_bias, down_bias,
        gate_up_lora_A, gate_up_lora_B, down_lora_A, down_lora_B,
        gate_up_proj.shape[0], down_proj.shape[-1],
        gate_up_format, gate_up_group_size, down_format, down_group_size, compute,
        gate_up_scaling, down_scaling, activation, [*activation_args], gating, reduce,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad
        for tensor in (
            hidden_states, topk_weights, gate_up, down, gate_up_bias, down_bias,
            gate_up_lora_A, gate_up_lora_B, down_lora_A, down_lora_B,
        )
    ):  # fmt: skip
        return torch.ops.kt.moe_sft_fwd(*arguments, save)[0]
    if (
        stream_min_tokens is not None
        and not hidden_states.is_cpu
        and hidden_states.shape[0] >= stream_min_tokens
    ):
        return torch.ops.kt.moe_fwd_streamed(*arguments, PORTION_BYTES)
    if torch.compiler.is_compiling():
        return torch.ops.kt.moe_fwd(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # no gradient to refuse; autograd takes longer than the op
        return torch.ops.kt.moe_fwd(*arguments)


_NOT_GIVEN: dict[str, Any] = dict.fromkeys(MoeArguments._fields) | {
    name: parameter.default
    for name, parameter in inspect.signature(moe_sft).parameters.items()
    if name in MoeArguments._fields and parameter.default is not parameter.empty
}


def moe_arguments(**given: Any) -> MoeArguments:
    """Converts keyword arguments of :func:`moe_sft` to the operators' arguments, with the same defaults.

    ``given`` may also contain arguments that only the operators have, such as "num_experts"; they take
    precedence.

    Example:
        >>> torch.ops.kt.moe_sft_fwd(*moe_arguments(**inputs, activation="gelu"), "recompute")
    """
    values = _NOT_GIVEN | {
        "num_experts": given["gate_up_proj"].shape[0],
        "intermediate_size": given["down_proj"].shape[-1],
    }
    for prefix in ("gate_up", "down"):
        names = (f"{prefix}_{part}" for part in ("proj", "scale", "zero", "format", "group_size"))
        values |= zip(names, in_format(given[f"{prefix}_proj"]), strict=True)
    values |= {name: value for name, value in given.items() if not isinstance(value, ExpertWeight)}
    values["activation_args"] = activation_arguments(values["activation"], values["activation_args"])
    return MoeArguments(**values)


def checkpoint_context_fn():
    """Returns a ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

    It keeps the outputs of the experts' forward, so recomputing a checkpointed block does not run the experts
    again.

    Example:
        >>> checkpoint(block, x, use_reentrant=False, context_fn=ktops.checkpoint_context_fn)
    """
    return create_selective_checkpoint_contexts([torch.ops.kt.moe_sft_fwd.default])
