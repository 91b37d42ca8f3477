"""How far the experts of a converted layer are from those they were made from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import float_rows, give_back_freed_memory
from ktops.checkpoints.layer import Layer
from ktops.formats.error import RelativeError
from ktops.reference import activation as functions

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
        outputs = _compare_expert(source, converted, index, tokens, activation, errors)
        errors["output"].add(*outputs)
        give_back_freed_memory()
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


def _compare_expert(
    source: Layer, converted: Layer, index: int, tokens: Tensor, activation: str, errors: dict
) -> tuple[Tensor, Tensor]:
    """Outputs of an expert of the converted layer and of the source; few rows are floats at a time."""
    made = expected = tokens
    for kind in ("gate_up", "down"):
        pair = [getattr(layer, f"{kind}_proj") for layer in (converted, source)]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for ours, theirs in zip(*(float_rows(experts, index) for experts in pair), strict=True):
            if not bool(theirs.isfinite().all()):
                raise CheckpointError(
                    f"{source.name}: {kind}_proj of expert {index} has values that are not finite"
                )
            errors[kind].add(ours, theirs)
            parts[0].append(made @ ours.T)
            parts[1].append(expected @ theirs.T)
        made, expected = (torch.cat(part, dim=1) for part in parts)
        if kind == "gate_up":
            made, expected = (_activated(gate_up, activation) for gate_up in (made, expected))
    return made, expected


def _activated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return getattr(functions, activation)(gate)[0] * up
