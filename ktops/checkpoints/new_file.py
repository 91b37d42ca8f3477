"""The files that CheckpointWriter writes, as independent tasks."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ktops._version import __version__
from ktops.checkpoints.experts import Experts, Held
from ktops.checkpoints.stream import COPIED_BYTES, SafetensorsStream
from ktops.checkpoints.view import View
from ktops.formats import ExpertWeight
from ktops.ops.activation import CONCATENATED, ExpertFunction


def extra_state(experts: Experts) -> Tensor:
    """Returns the extra state of an :class:`ktops.ExpertWeight` for these experts."""
    layout = {"format": experts.format, "shape": list(experts.shape), "group_size": experts.group_size}
    return torch.frombuffer(bytearray(json.dumps(layout).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NewLayer(NamedTuple):
    """The experts of a layer to write; see :meth:`CheckpointWriter.write_layer`."""

    name: str
    gate_up_proj: Experts | ExpertWeight
    down_proj: Experts | ExpertWeight
    gate_up_proj_bias: Tensor | None = None
    down_proj_bias: Tensor | None = None
    gating: str | None = None


Task = Callable[[], int]
"""Writes a part of a file, and returns the number of steps that this counts for."""


@dataclass
class NewFile:
    """A file that is being written.

    Attributes:
        kind: "layers" or "tensors".
        name: of the layer, or of the file.
        tensors: the names of its tensors.
        tasks: what writes the file; it is complete when all have run, in any order.
    """

    kind: str
    name: str
    stream: SafetensorsStream
    tensors: list[str]
    tasks: list[Task]


def layer_file(path: Path, layer: NewLayer) -> NewFile:
    gate_up, down = _experts(layer.gate_up_proj), _experts(layer.down_proj)
    gating = layer.gating or gate_up.gating or CONCATENATED
    first_name = ExpertFunction(gating=gating).first_name
    both = {f"{layer.name}.{first_name}": gate_up, f"{layer.name}.down_proj": down}
    biases = layer.gate_up_proj_bias, layer.down_proj_bias
    whole = {f"{key}_bias": bias for key, bias in zip(both, biases, strict=True) if bias is not None}
    whole |= {f"{key}._extra_state": extra_state(experts) for key, experts in both.items()}
    tensors = {
        f"{key}.{kind}": (tensor.dtype, (len(experts), *tensor.shape))
        for key, experts in both.items()
        for kind, tensor in experts.stand_in._asdict().items()
        if tensor is not None
    } | {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in whole.items()}
    stream = SafetensorsStream(path, tensors, {"ktops": __version__, "gating": gating})
    tasks: list[Task] = [partial(_write_whole, stream, whole)]
    tasks += [partial(_write_expert, stream, both, index) for index in range(len(gate_up))]
    return NewFile("layers", layer.name, stream, list(tensors), tasks)


def _write_whole(stream: SafetensorsStream, tensors: Mapping[str, Tensor]) -> int:
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    return 0


def _write_expert(stream: SafetensorsStream, both: Mapping[str, Experts], index: int) -> int:
    for key, experts in both.items():
        for kind, tensor in experts.expert(index)._asdict().items():
            if tensor is not None:
                stream.write(f"{key}.{kind}", tensor, index)
    return len(both)


def tensor_file(path: Path, tensors: Mapping[str, View | Tensor | LazyTensor]) -> NewFile:
    stream = SafetensorsStream(
        path, {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    )
    tasks: list[Task] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, View):
            tasks += _copies(stream, name, tensor)
        else:
            tasks.append(partial(_write_tensor, stream, name, tensor))
    return NewFile("tensors", path.name, stream, list(tensors), tasks)


def _copies(stream: SafetensorsStream, name: str, view: View) -> Iterator[Task]:
    """Yields tasks that copy parts of a view; the last counts as a step."""
    begins = range(0, max(1, view.nbytes), COPIED_BYTES)
    for begin in begins:
        yield partial(_copy, stream, name, view, begin, is_last=begin == begins[-1])


def _copy(stream: SafetensorsStream, name: str, view: View, begin: int, *, is_last: bool) -> int:
    stream.copy(name, view, begin, min(begin + COPIED_BYTES, view.nbytes))
    return int(is_last)


def _write_tensor(stream: SafetensorsStream, name: str, tensor: Tensor | LazyTensor) -> int:
    stream.write(name, tensor if isinstance(tensor, Tensor) else tensor.read())
    return 1


def _experts(experts: Experts | ExpertWeight) -> Experts:
    return Held(experts) if isinstance(experts, ExpertWeight) else experts
