"""Measures the errors of a converted layer's experts relative to their source."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ktops._workers import Workers
from ktops.checkpoints.activations import BY_HIDDEN_ACT
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import float_rows
from ktops.checkpoints.layer import PROJECTIONS, Layer
from ktops.formats.error import RelativeError
from ktops.ops.activation import INTERLEAVED, UNGATED, ExpertFunction, gate

MOST_EXPERTS = 16
"""Maximum number of experts of a layer to compare, evenly spaced."""

MOST_ROWS = 512
"""Maximum number of neurons, and of rows of down_proj, of the expert in a sample."""

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


class Extent(NamedTuple):
    """The part of a layer to compare.

    Attributes:
        experts: their numbers.
        neurons: the rows of gate and of up, and the columns of down_proj that multiply them.
        rows: the rows of down_proj.
    """

    experts: Sequence[int]
    neurons: range
    rows: range


def most(layer: Layer) -> Extent:
    """Returns up to MOST_EXPERTS whole experts of a layer, evenly spaced."""
    count = min(layer.num_experts, MOST_EXPERTS)
    experts = [number * layer.num_experts // count for number in range(count)]
    return Extent(experts, range(layer.intermediate_size), range(layer.hidden_size))


def sample(layer: Layer) -> Extent:
    """Returns some neurons and rows of one expert, the same for a layer of the same name and sizes."""
    random = Random(layer.written_name)
    blocks = [_some_rows(size, random) for size in (layer.intermediate_size, layer.hidden_size)]
    return Extent([random.randrange(layer.num_experts)], *blocks)


def _some_rows(size: int, random: Random) -> range:
    """Returns up to MOST_ROWS of so many rows; all if blocks of 128 rows would not begin with gate and up."""
    if size % 128 or size <= MOST_ROWS:
        return range(size)
    begin = 128 * random.randrange((size - MOST_ROWS) // 128 + 1)
    return range(begin, begin + MOST_ROWS)


@dataclass(frozen=True)
class LayerQuality:
    """Relative errors (2-norm) of a converted layer; None for what is not compared.

    Attributes:
        name: name of the experts in the converted checkpoint.
        scheme: how the source stores them.
        num_experts, measured_experts: number of experts in the layer, and of those compared.
        measured_weights: number of weights compared.
        gate_up_error, down_error: errors of the weights.
        output_error: error of the experts' outputs for random normal tokens.
        bytes, bytes_bf16: size of all weights of the layer, converted and in bf16.
    """

    name: str
    scheme: str
    num_experts: int
    measured_experts: int = 0
    measured_weights: int = 0
    gate_up_error: float | None = None
    down_error: float | None = None
    output_error: float | None = None
    bytes: int = 0
    bytes_bf16: int = 0


@torch.no_grad()
def compare(
    name: str,
    source: Layer,
    converted: Layer,
    function: ExpertFunction | None,
    extent: Extent | None,
    workers: Workers,
) -> LayerQuality:
    """Compares two layers expert by expert, in float32.

    Args:
        name: name of the layer in the converted checkpoint.
        source, converted: the layers, with gate and up in the order of function.
        function: what the experts compute; None skips comparing outputs.
        extent: what to compare; None for nothing.
        workers: compare several experts at once; a single one is compared on the caller's thread.

    Raises:
        CheckpointError: weights of the source are not finite.
    """
    both = converted.gate_up_proj, converted.down_proj
    unmeasured = LayerQuality(
        name,
        source.scheme,
        source.num_experts,
        bytes=converted.nbytes,
        bytes_bf16=2 * sum(torch.Size(experts.shape).numel() for experts in both),
    )
    if extent is None:
        return unmeasured
    pair, errors = _Pair(source, converted, function, extent), _no_errors()
    tasks = [partial(pair.errors, index) for index in extent.experts]
    for found in workers.in_order(tasks) if len(tasks) > 1 else (task() for task in tasks):
        for kind, error in found.items():
            errors[kind].include(error)
    return replace(
        unmeasured,
        measured_experts=len(tasks),
        measured_weights=len(tasks) * pair.weights_per_expert,
        gate_up_error=errors["gate_up_proj"].value,
        down_error=errors["down_proj"].value,
        output_error=None if function is None else errors["output"].value,
    )


def _no_errors() -> dict[str, RelativeError]:
    return {name: RelativeError() for name in (*PROJECTIONS, "output")}


class _Pair:
    """A layer before and after conversion."""

    def __init__(
        self, source: Layer, converted: Layer, function: ExpertFunction | None, extent: Extent
    ) -> None:
        self.source, self.converted, self.function, self.extent = source, converted, function, extent
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(TOKENS, source.hidden_size, generator=generator)
        self.rows = {
            "gate_up_proj": _gate_up_rows(source.gating, extent.neurons, source.intermediate_size),
            "down_proj": [extent.rows],
        }
        self.biases = {name: source.bias(name, torch.float32) for name in PROJECTIONS}

    @property
    def weights_per_expert(self) -> int:
        columns = {"gate_up_proj": self.source.hidden_size, "down_proj": self.source.intermediate_size}
        return sum(columns[name] * sum(map(len, self.rows[name])) for name in PROJECTIONS)

    def errors(self, index: int) -> dict[str, RelativeError]:
        """Returns the errors of an expert's weights and outputs. Decodes only a few rows at a time."""
        errors = _no_errors()
        made = expected = self.tokens
        for name in PROJECTIONS:
            outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
            for ours, theirs in self._pieces(name, index):
                errors[name].add(ours, theirs)
                if self.function is None:
                    continue
                columns = slice(None) if name == "gate_up_proj" else _slice(self.extent.neurons)
                outputs[0].append(made @ ours[:, columns].T)
                outputs[1].append(expected @ theirs[:, columns].T)
            if self.function is None:
                continue
            made, expected = (torch.cat(pieces, dim=1) + self._bias(name, index) for pieces in outputs)
            if name == "gate_up_proj":
                made, expected = (gate(*self.function, gate_up)[0] for gate_up in (made, expected))
        if self.function is not None:
            errors["output"].add(made, expected)
        return errors

    def _pieces(self, name: str, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields rows of a projection of an expert, converted and source."""
        pair = (getattr(layer, name) for layer in (self.converted, self.source))
        pieces = (float_rows(experts, index, self.rows[name]) for experts in pair)
        for ours, theirs in zip(*pieces, strict=True):
            if not bool(theirs.isfinite().all()):
                raise CheckpointError(
                    f"{self.source.name}: {name} of expert {index} has values that are not finite"
                )
            yield ours, theirs

    def _bias(self, name: str, index: int) -> Tensor | float:
        bias = self.biases[name]
        if bias is None:
            return 0.0
        return torch.cat([bias[index, _slice(rows)] for rows in self.rows[name]])


def _gate_up_rows(gating: str, neurons: range, intermediate_size: int) -> list[range]:
    """Returns the rows of gate_up_proj, or up_proj, that compute some of the neurons."""
    if gating == UNGATED:
        return [neurons]
    if gating == INTERLEAVED:
        return [range(2 * neurons.start, 2 * neurons.stop)]
    return [neurons, range(intermediate_size + neurons.start, intermediate_size + neurons.stop)]


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
