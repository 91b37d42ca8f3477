"""How far the experts of a converted layer are from those they were made from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.layer import Layer
from ktops.formats.error import RelativeError, decode
from ktops.ops import moe_sft

MOST_EXPERTS = 16
"""Experts of a layer that are compared, evenly spread."""

TOKENS = 32

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""hidden_act of config.json -> activation of the op; silu where there is another."""


@dataclass(frozen=True)
class LayerQuality:
    """Relative errors (2-norm) of a converted layer.

    Attributes:
        name: of the experts in the converted checkpoint.
        scheme: how the source stores them.
        num_experts, measured_experts: of the layer, and those compared.
        gate_up_error, down_error: of the weights.
        output_error: of each expert's output for random normal tokens.
        bytes, bytes_bf16: of all weights of the layer, converted and in bf16.
    """

    name: str
    scheme: str
    num_experts: int
    measured_experts: int
    gate_up_error: float
    down_error: float
    output_error: float
    bytes: int
    bytes_bf16: int


@torch.no_grad()
def compare(name: str, source: Layer, converted: Layer, hidden_act: str | None = None) -> LayerQuality:
    """Compares two layers expert by expert, in float32.

    Raises:
        CheckpointError: weights of the source are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, source.hidden_size, generator=generator)
    activation = ACTIVATIONS.get(hidden_act, "silu")
    errors = {"gate_up": RelativeError(), "down": RelativeError(), "output": RelativeError()}
    count = min(source.num_experts, MOST_EXPERTS)
    for index in (number * source.num_experts // count for number in range(count)):
        made, expected = (_floats(layer, index) for layer in (converted, source))
        for kind, weight in expected.items():
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{source.name}: {kind}_proj of expert {index} has values that are not finite"
                )
        for weights in (made, expected):
            weights["output"] = _output(tokens, weights["gate_up"], weights["down"], activation)
        for kind, error in errors.items():
            error.add(made[kind], expected[kind])
    both = converted.gate_up_proj, converted.down_proj
    return LayerQuality(
        name,
        source.scheme,
        source.num_experts,
        count,
        *(error.value for error in errors.values()),
        bytes=converted.nbytes,
        bytes_bf16=2 * sum(torch.Size(experts.shape).numel() for experts in both),
    )


def _floats(layer: Layer, index: int) -> dict[str, Tensor]:
    return {"gate_up": decode(layer.gate_up_proj, index), "down": decode(layer.down_proj, index)}


def _output(tokens: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    ids = torch.zeros(TOKENS, 1, dtype=torch.int64)
    return moe_sft(tokens, ids, torch.ones(TOKENS, 1), gate_up[None], down[None], activation=activation)
