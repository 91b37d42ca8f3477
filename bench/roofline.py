"""Computes the least work of a call, and how long this machine needs for it.

Only work that no implementation can avoid is counted, so that fractions of the roofline are never too high.
Padding, re-reads, saved activations, and the zero gradients of experts without tokens are left out.
"""

import math
from dataclasses import dataclass

from bench.layer import Variant
from bench.shapes import Shape


@dataclass(frozen=True)
class Limits:
    """Limits of the machine: peak in FLOP/s and bandwidth in bytes/s, both of all threads together."""

    peak: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Work of a call: FLOPs (two per multiply-add) and bytes moved between memory and cores."""

    flops: int
    bytes: int

    def seconds(self, limits: Limits) -> float:
        """Returns the roofline, the longer of the times to compute at the peak and to move the bytes."""
        return max(self.flops / limits.peak, self.bytes / limits.bandwidth)

    def bound(self, limits: Limits) -> str:
        """Returns "compute" or "memory", whichever takes longer."""
        return "compute" if self.flops / limits.peak >= self.bytes / limits.bandwidth else "memory"


def _gate_up_elements(shape: Shape, variant: Variant) -> int:
    return shape.hidden_size * variant.experts.gate_up_rows(shape)


def _expert_elements(shape: Shape, variant: Variant) -> int:
    return _gate_up_elements(shape, variant) + shape.hidden_size * shape.intermediate_size


def _lora_elements(shape: Shape, variant: Variant) -> int:
    """Returns the elements of the four LoRA matrices of one expert: gate_up r·(H + 2I), down r·(I + H)."""
    rows = variant.experts.gate_up_rows(shape) + shape.intermediate_size
    return variant.rank * (2 * shape.hidden_size + rows)


def _output_elements(shape: Shape, tokens: int, variant: Variant) -> int:
    return math.prod(variant.experts.output_size(shape, tokens))


def forward_work(
    shape: Shape, tokens: int, distinct_experts: int, variant: Variant, itemsize: int = 2
) -> Work:
    """Returns the work of kt::moe_fwd.

    That is 6·T·K·H·I FLOPs (4 without a gate) plus LoRA's; it reads the routed experts' weights once, and
    moves hidden_states and output.

    Args:
        distinct_experts: the number of experts with at least one token.
        variant: its rank is that of the gate_up and down adapters, 0 without LoRA. Biases are not counted.
        itemsize: bytes per element.
    """
    expert = _expert_elements(shape, variant) + _lora_elements(shape, variant)
    routes = tokens * shape.top_k
    activations = tokens * shape.hidden_size + _output_elements(shape, tokens, variant)
    return Work(2 * routes * expert, itemsize * (distinct_experts * expert + activations))


def training_work(
    shape: Shape, tokens: int, distinct_experts: int, variant: Variant, itemsize: int = 2
) -> Work:
    """Returns the work of kt::moe_sft_fwd and _bwd: 12·T·K·H·I FLOPs plus three times LoRA's forward.

    Without a gate they are 8·T·K·H·I. The routed experts' weights are read twice and their LoRA gradients
    written once. Activations are hidden_states (twice), output, grad_output and grad_hidden_states. Full
    fine-tuning adds half as many FLOPs and the gradients of the routed experts' weights. save="recompute",
    the caller's choice, adds another product with gate_up_proj. The arguments are those of
    :func:`forward_work`.
    """
    lora, weights = _lora_elements(shape, variant), _expert_elements(shape, variant)
    gate_up = _gate_up_elements(shape, variant)
    products = 2 * weights + (weights if variant.full else 0)
    moved = 2 * (weights + lora) + lora + (weights if variant.full else 0)
    if variant.save == "recompute":
        products, moved = products + gate_up, moved + gate_up
    flops = 2 * tokens * shape.top_k * (products + 3 * lora)
    activations = 3 * tokens * shape.hidden_size + 2 * _output_elements(shape, tokens, variant)
    return Work(flops, itemsize * (distinct_experts * moved + activations))
