"""Measures the errors of a converted layer's experts relative to their source."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.checkpoints.activations import BY_HIDDEN_ACT
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import float_rows, give_back_freed_memory
from ktops.checkpoints.layer import PROJECTIONS, Layer
from ktops.formats.error import RelativeError
from ktops.ops.activation import ExpertFunction, gate

MOST_EXPERTS = 16
"""Maximum number of experts of a layer to compare, evenly spaced."""

TOKENS = 32

KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
"""Names of the experts' activation in config.json."""


class Activation(NamedTuple):
    """The activation for comparing outputs, None if they are not compared, and a note for the report."""

    name: str | None
    note: str | None = None


def find_activation(config: dict) -> Activation:
    """Returns the activation in the config.json of a model that transformers does not know.

    It prefers the text model's if there are several.

    Example:
        >>> find_activation({"hidden_act": "gelu_pytorch_tanh"})
        Activation(name='gelu_tanh', note=None)
    """
    thinker = config.get("thinker_config") or {}
    for part in (config.get("text_config"), thinker.get("text_config"), config):
        if not part:
            continue
        given = next((part[key] for key in KEYS if part.get(key) is not None), None)
        if given is None:
            continue
        if given not in BY_HIDDEN_ACT:
            return Activation(None, f"outputs are not compared: ktops has no activation {given!r}")
        if part.get("swiglu_limit") is not None:
            return Activation(None, f"outputs are not compared: ktops has no {given!r} with a swiglu_limit")
        return Activation(BY_HIDDEN_ACT[given])
    return Activation("silu", "no config.json names the activation; outputs are compared with silu")


@dataclass(frozen=True)
class LayerQuality:
    """Relative errors (2-norm) of a converted layer.

    Attributes:
        name: name of the experts in the converted checkpoint.
        scheme: how the source stores them.
        num_experts, measured_experts: number of experts in the layer, and of those compared.
        gate_up_error, down_error: errors of the weights.
        output_error: error of the experts' outputs for random normal tokens; None if not compared.
        bytes, bytes_bf16: size of all weights of the layer, converted and in bf16.
    """

    name: str
    scheme: str
    num_experts: int
    measured_experts: int
    gate_up_error: float
    down_error: float
    output_error: float | None
    bytes: int
    bytes_bf16: int


@torch.no_grad()
def compare(name: str, source: Layer, converted: Layer, function: ExpertFunction | None) -> LayerQuality:
    """Compares two layers expert by expert, in float32.

    Args:
        name: name of the layer in the converted checkpoint.
        source, converted: the layers, with gate and up in the order of function.
        function: what the experts compute; None skips comparing outputs.

    Raises:
        CheckpointError: weights of the source are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, source.hidden_size, generator=generator)
    errors = {name: RelativeError() for name in (*PROJECTIONS, "output")}
    biases = {name: source.bias(name, torch.float32) for name in PROJECTIONS}
    count = min(source.num_experts, MOST_EXPERTS)
    for index in (number * source.num_experts // count for number in range(count)):
        of_expert = {name: bias[index] if bias is not None else 0 for name, bias in biases.items()}
        outputs = _compare_expert(source, converted, index, tokens, of_expert, function, errors)
        if outputs is not None:
            errors["output"].add(*outputs)
        give_back_freed_memory()
    both = converted.gate_up_proj, converted.down_proj
    return LayerQuality(
        name,
        source.scheme,
        source.num_experts,
        count,
        errors["gate_up_proj"].value,
        errors["down_proj"].value,
        None if function is None else errors["output"].value,
        bytes=converted.nbytes,
        bytes_bf16=2 * sum(torch.Size(experts.shape).numel() for experts in both),
    )


def _compare_expert(
    source: Layer,
    converted: Layer,
    index: int,
    tokens: Tensor,
    biases: dict,
    function: ExpertFunction | None,
    errors: dict,
) -> tuple[Tensor, Tensor] | None:
    """Adds the errors of one expert's weights. If there is a function, returns the expert's outputs,
    converted and source. Decodes only a few rows at a time."""
    made = expected = tokens
    for name in PROJECTIONS:
        pair = [getattr(layer, name) for layer in (converted, source)]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for ours, theirs in zip(*(float_rows(experts, index) for experts in pair), strict=True):
            if not bool(theirs.isfinite().all()):
                raise CheckpointError(
                    f"{source.name}: {name} of expert {index} has values that are not finite"
                )
            errors[name].add(ours, theirs)
            if function is None:
                continue
            parts[0].append(made @ ours.T)
            parts[1].append(expected @ theirs.T)
        if function is None:
            continue
        made, expected = (torch.cat(part, dim=1) + biases[name] for part in parts)
        if name == "gate_up_proj":
            made, expected = (gate(*function, gate_up)[0] for gate_up in (made, expected))
    return None if function is None else (made, expected)
