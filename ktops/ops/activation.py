"""Activations of the experts and their derivatives."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _sigmoid_grad(s: Tensor) -> Tensor:
    return s * (1 - s)


def silu(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·σ(g)"""
    s = torch.sigmoid(g)
    return g * s, s + g * _sigmoid_grad(s)


def gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·Φ(g), with Φ the standard normal CDF"""
    cdf = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    pdf = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    return g * cdf, cdf + g * pdf


def gelu_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    """g·σ(2z) = 0.5 g (1 + tanh z), with z = √(2/π)(g + 0.044715 g³)"""
    c = math.sqrt(2 / math.pi)
    s = torch.sigmoid(2 * c * (g + 0.044715 * g**3))
    return g * s, s + g * _sigmoid_grad(s) * 2 * c * (1 + 3 * 0.044715 * g * g)


def relu(g: Tensor) -> tuple[Tensor, Tensor]:
    """max(g, 0)"""
    return g.clamp(min=0), (g > 0).to(g.dtype)


def relu2(g: Tensor) -> tuple[Tensor, Tensor]:
    """max(g, 0)²"""
    positive = g.clamp(min=0)
    return positive * positive, 2 * positive


def sigmoid(g: Tensor) -> tuple[Tensor, Tensor]:
    """σ(g)"""
    s = torch.sigmoid(g)
    return s, _sigmoid_grad(s)


def swiglu_clamped(
    g: Tensor, u: Tensor, limit: float, alpha: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """g'·σ(alpha·g')·(u' + offset), with g' = min(g, limit) and u' = u clamped to ±limit"""
    low_g, low_u = g.clamp(max=limit), u.clamp(-limit, limit) + offset
    s = torch.sigmoid(alpha * low_g)
    value, derivative = low_g * s, s + alpha * low_g * _sigmoid_grad(s)
    return value * low_u, low_u * derivative * (g <= limit), value * (u.abs() <= limit)


def swiglu_step(g: Tensor, u: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """min(silu(g), limit)·u', with u' = u clamped to ±limit"""
    act, derivative = silu(g)
    value, low_u = act.clamp(max=limit), u.clamp(-limit, limit)
    return value * low_u, low_u * derivative * (act <= limit), value * (u.abs() <= limit)


def swiglu_softcapped(
    g: Tensor, u: Tensor, gate_softcap: float, up_softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """g'·σ(g)·u', with g' = c·tanh(g/c), c = gate_softcap, and u' likewise with up_softcap"""
    tanh_g, tanh_u, s = torch.tanh(g / gate_softcap), torch.tanh(u / up_softcap), torch.sigmoid(g)
    low_g, low_u = gate_softcap * tanh_g, up_softcap * tanh_u
    derivative = (1 - tanh_g * tanh_g) * s + low_g * _sigmoid_grad(s)
    return low_g * s * low_u, low_u * derivative, low_g * s * (1 - tanh_u * tanh_u)


class Activation(NamedTuple):
    """What the experts compute between their two products.

    Attributes:
        function: with ``of_gate``, (g) -> (act(g), act'(g)), for h = act(g)·u or, without a gate projection,
            h = act(g); else (g, u, \\*parameters) -> (h, ∂h/∂g, ∂h/∂u).
        of_gate: whether it is a function of the gate alone.
        parameters: maps the names of ``activation_args``, in order, to their defaults; None: required.
    """

    function: Callable[..., tuple[Tensor, ...]]
    of_gate: bool = True
    parameters: Mapping[str, float | None] = {}


ACTIVATIONS = {
    "silu": Activation(silu),
    "gelu": Activation(gelu),
    "gelu_tanh": Activation(gelu_tanh),
    "relu": Activation(relu),
    "relu2": Activation(relu2),
    "sigmoid": Activation(sigmoid),
    "swiglu_clamped": Activation(swiglu_clamped, False, {"limit": None, "alpha": 1.0, "offset": 0.0}),
    "swiglu_step": Activation(swiglu_step, False, {"limit": None}),
    "swiglu_softcapped": Activation(swiglu_softcapped, False, {"gate_softcap": None, "up_softcap": None}),
}
"""The activations of the operators, by name."""

GATINGS = CONCATENATED, INTERLEAVED, UNGATED = "concatenated", "interleaved", "none"
"""How the rows of gate_up_proj hold the gate and up projections; see :func:`ktops.moe_sft`."""


class ExpertFunction(NamedTuple):
    """What an expert computes between its products, in the terms of :func:`ktops.moe_sft`.

    Example:
        >>> ktops.moe_sft(x, ids, w, gate_up_proj, down_proj, **ExpertFunction("gelu")._asdict())
    """

    activation: str = "silu"
    activation_args: tuple[float, ...] = ()
    gating: str = CONCATENATED

    @property
    def first_name(self) -> str:
        """The name of the first weight in modules of transformers."""
        return "up_proj" if self.gating == UNGATED else "gate_up_proj"

    def rows(self, intermediate_size: int) -> int:
        """Returns the number of rows of an expert's first weight."""
        return intermediate_size * (1 if self.gating == UNGATED else 2)


def activation_arguments(activation: str, args: Sequence[float] | Mapping[str, float]) -> list[float]:
    """Returns the operators' activation_args for numbers given in order or by name.

    Raises:
        RuntimeError: a name is not a parameter of the activation, or a parameter without default is missing,
            or args is a single number.

    Example:
        >>> activation_arguments("swiglu_clamped", {"limit": 7.0, "offset": 1.0})
        [7.0, 1.0, 1.0]
    """
    if not isinstance(args, Mapping):
        if not isinstance(args, Iterable):
            raise RuntimeError(f"ktops.moe_sft: activation_args must be a sequence or a mapping, got {args}")
        return [*args]
    parameters = ACTIVATIONS[activation].parameters if activation in ACTIVATIONS else dict.fromkeys(args, 0.0)
    expected = f"must have {', '.join(parameters) or 'no parameter'} for activation '{activation}'"
    for name in args:
        if name not in parameters:
            raise RuntimeError(f"ktops.moe_sft: activation_args {expected}, got {name!r}")
    values = []
    for name, value in {**parameters, **args}.items():
        if value is None:
            raise RuntimeError(f"ktops.moe_sft: activation_args {expected}, got no {name}")
        values.append(value)
    return values


def gate(
    activation: str, args: Sequence[float], gating: str, gate_up: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Computes h from rows of [g | u].

    Args:
        gate_up: [R, 2I] in the order of ``gating``, or [R, I] without a gate.

    Returns:
        h [R, I], and the function that maps its gradient to that of gate_up.
    """
    function, of_gate, _ = ACTIVATIONS[activation]
    if gating == UNGATED:
        h, derivative = function(gate_up)
        return h, lambda grad: grad * derivative
    interleaved = gating == INTERLEAVED
    g, u = (gate_up[:, 0::2], gate_up[:, 1::2]) if interleaved else gate_up.tensor_split(2, dim=1)
    if of_gate:
        act, d_act = function(g)
        h, dg, du = act * u, d_act * u, act
    else:
        h, dg, du = function(g, u, *args)

    def backward(grad: Tensor) -> Tensor:
        halves = grad * dg, grad * du
        return torch.stack(halves, dim=2).flatten(1) if interleaved else torch.cat(halves, dim=1)

    return h, backward
