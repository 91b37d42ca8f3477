"""What a call must compute and move at least, and how long this machine needs for that.

Only work that no implementation can avoid is counted, so a fraction of the roofline is never flattered:
padding, re-reads, saved activations, and the zero gradients of experts without tokens are left out.
"""

from dataclasses import dataclass

from bench.layer import Variant
from bench.shapes import Shape


@dataclass(frozen=True)
class Limits:
    """What the machine can do: peak in FLOP/s, bandwidth in bytes/s, both for all threads together."""

    peak: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What a call has to do: FLOPs (two a multiply-add) and bytes between memory and cores."""

    flops: int
    bytes: int

    def seconds(self, limits: Limits) -> float:
        """The roofline: the longer of computing at the peak and moving at the bandwidth."""
        return max(self.flops / limits.peak, self.bytes / limits.bandwidth)

    def bound(self, limits: Limits) -> str:
        """ "compute" or "memory": which of the two is longer."""
        return "compute" if self.flops / limits.peak >= self.bytes / limits.bandwidth else "memory"


def _lora_elements(shape: Shape, rank: int) -> int:
    """Elements of the four LoRA matrices of one expert: gate_up r·(H + 2I), down r·(I + H)."""
    return rank * (2 * shape.hidden_size + 3 * shape.intermediate_size)


def forward_work(
    shape: Shape, tokens: int, distinct_experts: int, variant: Variant, itemsize: int = 2
) -> Work:
    """kt::moe_fwd: 6·T·K·H·I FLOPs plus LoRA's; routed experts' weights once, hidden_states, output.

    Args:
        distinct_experts: experts with at least one token.
        variant: its rank is that of gate_up's and of down's adapter, 0 without LoRA.
        itemsize: bytes an element.
    """
    expert = shape.expert_elements + _lora_elements(shape, variant.rank)
    routes = tokens * shape.top_k
    activations = 2 * tokens * shape.hidden_size
    return Work(2 * routes * expert, itemsize * (distinct_experts * expert + activations))


def training_work(
    shape: Shape, tokens: int, distinct_experts: int, variant: Variant, itemsize: int = 2
) -> Work:
    """kt::moe_sft_fwd and _bwd: 12·T·K·H·I FLOPs plus three times LoRA's forward.

    The routed experts' weights are read twice and their LoRA gradients written once; activations are
    hidden_states (twice), output, grad_output and grad_hidden_states. Full fine-tuning adds 6·T·K·H·I FLOPs
    and the gradients of the routed experts' weights; save="recompute", which the caller chose, another
    product with gate_up_proj. The arguments are those of :func:`forward_work`.
    """
    lora, weights = _lora_elements(shape, variant.rank), shape.expert_elements
    gate_up = 2 * shape.hidden_size * shape.intermediate_size
    products = 2 * weights + (weights if variant.full else 0)
    moved = 2 * (weights + lora) + lora + (weights if variant.full else 0)
    if variant.save == "recompute":
        products, moved = products + gate_up, moved + gate_up
    flops = 2 * tokens * shape.top_k * (products + 3 * lora)
    return Work(flops, itemsize * (distinct_experts * moved + 5 * tokens * shape.hidden_size))
