"""Describes what experts modules of transformers compute, in the terms of the op.

An experts module declares its layout in attributes (``has_gate``, ``is_transposed``, ...), so most
architectures need no entry here. One with a gate of its own has an entry in ``GATES``.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktops.checkpoints.activations import BY_CLASS
from ktops.formats import ExpertWeight
from ktops.nn.experts import DTYPES, KTExperts
from ktops.nn.layout import Layout, declared_gating
from ktops.ops.activation import UNGATED, ExpertFunction


class Unsupported(Exception):
    """Raised with the reason why the op does not run an experts module."""


Activation = tuple[str, tuple[float, ...]]
"""activation and activation_args of ktops.moe_sft."""


def _act(experts: Any) -> Activation:
    """act_fn(gate) * up"""
    if not hasattr(experts, "act_fn"):
        raise Unsupported("it has no act_fn")
    return require_activation(experts.act_fn), ()


def _limited(name: str, experts: Any, limit: float | None, *more: float) -> Activation:
    if hasattr(experts, "act_fn") and activation_name(experts.act_fn) != "silu":
        raise Unsupported(f"it limits an activation other than silu, {type(experts.act_fn).__name__}")
    return ("silu", ()) if limit is None or limit == math.inf else (name, (limit, *more))


def _clamped(experts: Any) -> Activation:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)"""
    limit = experts.swiglu_limit if hasattr(experts, "swiglu_limit") else experts.limit
    return _limited("swiglu_clamped", experts, limit, 1.0, 0.0)


def _gpt_oss(experts: Any) -> Activation:
    """min(gate, limit) σ(alpha min(gate, limit)) * (clamp(up, -limit, limit) + 1)"""
    return "swiglu_clamped", (experts.limit, experts.alpha, 1.0)


def _minimax(experts: Any) -> Activation:
    """The gate of gpt-oss."""
    return "swiglu_clamped", (experts.swiglu_limit, experts.swiglu_alpha, 1.0)


def _step(experts: Any) -> Activation:
    """min(silu(gate), limit) * clamp(up, -limit, limit)"""
    return _limited("swiglu_step", experts, experts.limit)


def _softcapped(experts: Any) -> Activation:
    """softcap(gate) σ(gate) * softcap(up)"""
    caps = experts.act_fn.gate_softcap.softcap, experts.act_fn.up_softcap.softcap
    return "swiglu_softcapped", caps


def _fp8(experts: Any) -> Activation:
    """transformers' FP8Experts stands in for any architecture, and takes its gate from the configuration."""
    if experts.gate_softcap is not None:
        return "swiglu_softcapped", (experts.gate_softcap, experts.up_softcap)
    if experts.swiglu_alpha is not None:
        return _minimax(experts)
    return _clamped(experts) if experts.limit is not None else _act(experts)


GATES: dict[str, Callable[[Any], Activation]] = {
    "integrations.moe._default_apply_gate": _act,
    "integrations.finegrained_fp8.FP8Experts": _fp8,
    "beam.modeling_beam.BeamExperts": _act,
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": _clamped,
    "glm5_next.modeling_glm5_next.Glm5NextTextExperts": _clamped,
    "gpt_oss.modeling_gpt_oss.GptOssExperts": _gpt_oss,
    "hy_v4.modeling_hy_v4.HYV4Experts": _clamped,
    "hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts": _clamped,
    "inkling2.modeling_inkling2.Inkling2Experts": _softcapped,
    "inkling2_loop.modeling_inkling2_loop.Inkling2LoopExperts": _softcapped,
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": _minimax,
    "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": _gpt_oss,
    "step3p7.modeling_step3p7.Step3p7Experts": _step,
}
"""Where an ``_apply_gate`` is defined -> the activation that it computes, whose docstring is its formula."""


def class_name(module: nn.Module) -> str:
    """Returns the class of a module, without the name of transformers' package of models.

    Example:
        >>> class_name(model.model.layers[0].feed_forward.experts)
        'llama4.modeling_llama4.Llama4TextExperts'
    """
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name.removeprefix("transformers.models.")


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


def require_activation(act_fn) -> str:
    """Returns what :func:`activation_name` does.

    Raises:
        Unsupported: the op has no such activation.
    """
    name = activation_name(act_fn)
    if name is None:
        kind = getattr(act_fn, "__name__", type(act_fn).__name__)
        raise Unsupported(f"ktops has no activation {kind}")
    return name


def in_interface(experts: nn.Module) -> bool:
    """True if the module looks up its forward in transformers' experts interface, and declares its layout."""
    return hasattr(experts, "has_bias") and hasattr(experts, "is_transposed")


def describe(experts: nn.Module) -> Layout:
    """Returns what an experts module computes, whatever the dtype and the device of its weights.

    Raises:
        Unsupported: the op cannot compute it.
    """
    if not in_interface(experts) and not _takes_routes(experts):
        raise Unsupported("its forward does not take (hidden_states, top_k_index, top_k_weights)")
    gating = declared_gating(experts)
    activation, args = _act(experts) if gating == UNGATED else _gate(experts)
    return Layout(
        ExpertFunction(activation, args, gating),
        getattr(experts, "is_transposed", False),
        getattr(experts, "has_post_expert_norm", False),
    )


def _gate(experts: nn.Module) -> Activation:
    if not hasattr(experts, "_apply_gate"):
        return _act(experts)
    if "_apply_gate" in experts.__dict__:
        raise Unsupported("its _apply_gate was replaced")
    known = GATES.get(_place_of_gate(type(experts)))
    if known is None:
        raise Unsupported("ktops does not know its _apply_gate")
    return known(experts)


@torch.compiler.assume_constant_result
def _place_of_gate(experts_class: Any) -> str:
    """Returns where the class's ``_apply_gate`` is defined, as a key of GATES."""
    gate = experts_class._apply_gate
    place = f"{gate.__module__}.{gate.__qualname__}".removesuffix("._apply_gate")
    return place.removeprefix("transformers.").removeprefix("models.")


def operands(experts: nn.Module) -> tuple[Layout, Tensor | ExpertWeight, Tensor | ExpertWeight]:
    """Returns what an experts module computes, and its weights as [E, 2I, H] and [E, H, I]; without
    a gate, [E, I, H] and [E, H, I].

    Raises:
        Unsupported: the op cannot compute it, or not with these weights.
    """
    if isinstance(experts, KTExperts):
        layout = experts.layout
    else:
        weight = experts._parameters.get("down_proj")
        if weight is not None and weight.element_size() == 1:
            raise Unsupported(f"its weights are quantized, {weight.dtype}")
        layout = describe(experts)
    gate_up_proj, down_proj = layout.weights(experts)
    require_weights(gate_up_proj, down_proj, layout.function.gating)
    return layout, gate_up_proj, down_proj


def _takes_routes(experts: nn.Module) -> bool:
    try:
        inspect.signature(experts.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def require_weights(
    gate_up_proj: Tensor | ExpertWeight, down_proj: Tensor | ExpertWeight, gating: str
) -> None:
    """Raises Unsupported unless the op can read these weights as [E, 2I, H] and [E, H, I]."""
    function = ExpertFunction(gating=gating)
    first = function.first_name
    if gate_up_proj.dtype not in DTYPES:
        raise Unsupported(f"its weights are stored in {gate_up_proj.dtype}")
    if gate_up_proj.dtype != down_proj.dtype:
        raise Unsupported(f"{first} is {gate_up_proj.dtype} and down_proj {down_proj.dtype}")
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        raise Unsupported("its weights are not stacked, [num_experts, ...]")
    num_experts, hidden_size, intermediate_size = down_proj.shape
    rows = function.rows(intermediate_size)
    if gate_up_proj.shape != torch.Size([num_experts, rows, hidden_size]):
        expected = "[E, I, H]" if gating == UNGATED else "[E, 2I, H]"
        raise Unsupported(
            f"{first} {list(gate_up_proj.shape)} and down_proj {list(down_proj.shape)} are not "
            f"{expected} and [E, H, I]"
        )
    if gate_up_proj.device.type != "cpu":
        raise Unsupported(
            f"its weights are on {gate_up_proj.device.type}, not in CPU memory, where a move by "
            "ktops.offload_experts leaves them"
        )
