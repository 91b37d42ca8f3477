"""One MoE layer, one route at a time, for autograd. Nothing but the formula.

Independent of ktops.reference, which it checks. Hooks turn it into a model of a kernel that rounds; see
:class:`Arithmetic`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}
"""The activations of ktops.ops.activation, which the tests compare with these and autograd."""


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


def moe_naive(
    inputs: dict, *, activation: str = "silu", arithmetic: Arithmetic | None = None, skip: str = ""
) -> Tensor:
    """Returns output [num_tokens, hidden_size] for the keyword arguments of ktops.moe_sft; differentiable.

    ``skip`` names an input to leave out as if it were None (1.0 for a scaling), to get a wrong result.
    """
    arithmetic = arithmetic or Arithmetic()
    inputs = {name: value for name, value in inputs.items() if name != skip}
    num_experts = inputs["gate_up_proj"].shape[0]

    def act(gate: Tensor) -> Tensor:
        return ACTIVATIONS[activation](gate, *inputs.get("activation_args", ()))

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

    rows = []
    for x, ids, weights in zip(
        inputs["hidden_states"], inputs["topk_ids"].tolist(), inputs["topk_weights"], strict=True
    ):
        row = torch.zeros_like(x)
        for e, w in zip(ids, weights, strict=True):
            if 0 <= e < num_experts:
                gate, up = arithmetic.value(layer(x, "gate_up", e)).chunk(2)
                row = row + w * layer(act(gate) * up, "down", e)
        rows.append(arithmetic.value(row))
    return torch.stack(rows) if rows else 0 * inputs["hidden_states"]
