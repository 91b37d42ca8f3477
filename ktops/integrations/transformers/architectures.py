"""Decides which experts modules of transformers the op can compute.

An experts module declares its layout in attributes (``has_gate``, ``is_transposed``, ...), so most
architectures need no entry here. One that looks special but computes the same has an entry in ``GATES``.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktops.checkpoints.activations import BY_CLASS
from ktops.nn.experts import DTYPES

TESTED = (
    "Qwen2-MoE", "Qwen3-MoE", "Qwen3.5-MoE", "Qwen3-Next", "Mixtral", "DeepSeek-V2", "DeepSeek-V3",
    "GLM4-MoE", "OLMoE",
)  # fmt: skip
"""Architectures that the tests compare with their eager implementation."""

GATES = {
    "modeling_beam.BeamExperts._apply_gate": "act_fn",  # act_fn(gate) * up in float32, like the op
    "finegrained_fp8.FP8Experts._apply_gate": "act_fn",  # act_fn(gate) * up where no limit is set
}
"""``_apply_gate`` of special architectures -> attribute that holds the activation of ``act(gate) * up``."""

LIMITS = ("gate_softcap", "swiglu_alpha", "limit")
"""Attributes that, unless None, make an ``_apply_gate`` in ``GATES`` a different function."""


def activation_name(act_fn) -> str | None:
    """Returns the op's name for an activation module or function, None if it has none.

    Example:
        >>> activation_name(ACT2FN["gelu_pytorch_tanh"])
        'gelu_tanh'
    """
    if act_fn is F.silu:
        return "silu"
    if act_fn is F.gelu:
        return "gelu"
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    return BY_CLASS.get(f"{type(act_fn).__module__}.{type(act_fn).__qualname__}")


def unsupported_layout(experts: nn.Module) -> str | None:
    """Returns why the op cannot run an experts module of transformers, None if it can. Reads no weights."""
    weight = experts._parameters.get("down_proj")
    if weight is not None and weight.element_size() == 1:
        return f"its weights are quantized, {weight.dtype}"
    if getattr(experts, "is_transposed", False):
        return "its weights are stored as [num_experts, in_features, out_features]"
    if not getattr(experts, "is_concatenated", True):
        return "its gate and up rows are interleaved"
    return unsupported_computation(experts)


def unsupported_computation(experts: nn.Module) -> str | None:
    """Returns why the op cannot compute an experts module, whatever its weight layout; None if it can."""
    if not hasattr(experts, "has_gate") and not _takes_routes(experts):
        return "its forward does not take (hidden_states, top_k_index, top_k_weights)"
    if not getattr(experts, "has_gate", True):
        return "its experts have no gate projection"
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalizes the output of every expert"
    gate = getattr(experts, "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        attribute = GATES.get(f"{gate.__module__.rpartition('.')[2]}.{gate.__qualname__}")
        if attribute is None or any(getattr(experts, limit, None) is not None for limit in LIMITS):
            return "its own _apply_gate is not act(gate) * up with an activation that ktops has"
    else:
        attribute = "act_fn"
    act_fn = getattr(experts, attribute, None)
    if activation_name(act_fn) is None:
        return f"ktops has no activation {getattr(act_fn, '__name__', type(act_fn).__name__)}"
    return None


def uncomputable_experts(modules: Mapping[str, nn.Module]) -> str | None:
    """Names the first experts module that the op cannot compute, and why; None if it can compute all."""
    for name, module in modules.items():
        if hasattr(module, "num_experts") and not isinstance(module, nn.ModuleList):
            reason = unsupported_computation(module)
            if reason is not None:
                return f"ktops cannot compute {name}, a {type(module).__name__}: {reason}"
    return None


def _takes_routes(experts: nn.Module) -> bool:
    try:
        inspect.signature(experts.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def unsupported_tensors(gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    """Returns why the op cannot read these weights, None if it can."""
    if gate_up_proj.dtype not in DTYPES:
        return f"its weights are stored in {gate_up_proj.dtype}"
    if gate_up_proj.dtype != down_proj.dtype:
        return f"gate_up_proj is {gate_up_proj.dtype} and down_proj {down_proj.dtype}"
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        return "its weights are not [num_experts, out_features, in_features]"
    num_experts, hidden_size, intermediate_size = down_proj.shape
    if gate_up_proj.shape != torch.Size([num_experts, 2 * intermediate_size, hidden_size]):
        return (
            f"gate_up_proj {list(gate_up_proj.shape)} and down_proj {list(down_proj.shape)} are not "
            "[E, 2I, H] and [E, H, I]"
        )
    if gate_up_proj.device.type != "cpu":
        return f"its weights are on {gate_up_proj.device.type}"
    return None
