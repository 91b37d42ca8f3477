"""One MoE layer, one route at a time, for autograd. Nothing but the formula.

Independent of ktops.reference, which it checks. Hooks turn it into a model of a kernel that rounds; see
:class:`Arithmetic`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
    "sigmoid": torch.sigmoid,
}
"""The activations of the gate alone in ktops.ops.activation, which tests compare with these and autograd."""


def _swiglu_clamped(gate: Tensor, up: Tensor, limit: float, alpha: float, offset: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + offset) * (gate * torch.sigmoid(gate * alpha))


def _swiglu_step(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)


def _swiglu_softcapped(gate: Tensor, up: Tensor, gate_softcap: float, up_softcap: float) -> Tensor:
    capped = gate_softcap * torch.tanh(gate / gate_softcap)
    return capped * torch.sigmoid(gate) * (up_softcap * torch.tanh(up / up_softcap))


GATES: dict[str, Callable[..., Tensor]] = {
    "swiglu_clamped": _swiglu_clamped,
    "swiglu_step": _swiglu_step,
    "swiglu_softcapped": _swiglu_softcapped,
}
"""The activations of gate and up in ktops.ops.activation."""


def _gate(inputs: dict, gate_up: Tensor) -> Tensor:
    """Returns h for one row, [2I] or, without a gate, [I]."""
    activation, gating = inputs.get("activation", "silu"), inputs.get("gating", "concatenated")
    if gating == "none":
        return ACTIVATIONS[activation](gate_up)
    gate, up = (gate_up[::2], gate_up[1::2]) if gating == "interleaved" else gate_up.chunk(2)
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation](gate) * up
    return GATES[activation](gate, up, *inputs["activation_args"])


class _Round(torch.autograd.Function):
    """Rounds to dtype, both the value and its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


@dataclass
class Arithmetic:
    """Computes as exactly as the inputs' dtype allows; subclasses round."""

    def value(self, x: Tensor) -> Tensor:
        """Returns a factor of a product or a result, rounded by subclasses."""
        return x

    def product(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight @ x


@dataclass
class Rounded(Arithmetic):
    """Rounds every factor and result once to ``dtype``, and nothing inside a product."""

    dtype: torch.dtype = torch.bfloat16

    def value(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self.dtype)


@dataclass
class RoundedAccumulation(Rounded):
    """Also rounds the running sum of every product after each ``step`` terms, as a kernel must not."""

    step: int = 2

    def product(self, weight: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros_like(weight[:, 0])
        for w, v in zip(weight.split(self.step, dim=1), x.split(self.step), strict=True):
            total = self.value(total + w @ v)
        return total


def _product_with_lora(arithmetic: Arithmetic, x, weight, bias, lora_a, lora_b, scaling):
    y = arithmetic.product(weight, x)
    if lora_a is not None:
        xa = arithmetic.value(scaling * arithmetic.product(arithmetic.value(lora_a), x))
        y = y + arithmetic.product(arithmetic.value(lora_b), xa)
    return y if bias is None else y + bias


def moe_naive(inputs: dict, *, arithmetic: Arithmetic | None = None, skip: str = "") -> Tensor:
    """Returns output [T, H], or [T, K, H] without reduce, for keyword arguments of ktops.moe_sft.

    Differentiable. ``skip`` names an input to leave out as if it were None (1.0 for a scaling), to get a
    wrong result.
    """
    arithmetic = arithmetic or Arithmetic()
    inputs = {name: value for name, value in inputs.items() if name != skip}
    num_experts, reduce = inputs["gate_up_proj"].shape[0], inputs.get("reduce", True)

    def expert(name: str, e: int) -> Tensor | None:
        return None if inputs.get(name) is None else inputs[name][e]

    def layer(x: Tensor, prefix: str, e: int) -> Tensor:
        lora_b = expert(f"{prefix}_lora_B", e)
        lora_a = None if lora_b is None else expert(f"{prefix}_lora_A", e)
        return _product_with_lora(
            arithmetic,
            arithmetic.value(x),
            inputs[f"{prefix}_proj"][e],
            expert(f"{prefix}_bias", e),
            lora_a,
            lora_b,
            inputs.get(f"{prefix}_scaling", 1.0),
        )

    def route(x: Tensor, e: int) -> Tensor:
        return layer(_gate(inputs, arithmetic.value(layer(x, "gate_up", e))), "down", e)

    rows = []
    for x, ids, weights in zip(
        inputs["hidden_states"], inputs["topk_ids"].tolist(), inputs["topk_weights"], strict=True
    ):
        routes = [route(x, e) if 0 <= e < num_experts else torch.zeros_like(x) for e in ids]
        row = torch.stack(routes)
        rows.append(arithmetic.value((weights[:, None] * row).sum(0) if reduce else row))
    if rows:
        return torch.stack(rows)
    zeros = 0 * inputs["hidden_states"]
    return zeros if reduce else zeros[:, None].expand(-1, inputs["topk_ids"].shape[1], -1)
