"""Published: the tensors of a merged checkpoint, under the names and in the files of the original one."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ktops._display import Step
from ktops.adapters.adapter import Adapter
from ktops.adapters.errors import AdapterError
from ktops.adapters.merged import merged_experts, merged_tensors
from ktops.checkpoints.checkpoint import Checkpoint
from ktops.checkpoints.layer import Layer
from ktops.checkpoints.names import EVERY_EXPERT
from ktops.checkpoints.schemes import is_of_activations
from ktops.checkpoints.stacking import in_order
from ktops.checkpoints.stream import SafetensorsStream
from ktops.checkpoints.view import View
from ktops.formats.plain import PLAIN
from ktops.ops.activation import CONCATENATED, INTERLEAVED, UNGATED

Kind = tuple[torch.dtype, tuple[int, ...]]
Group = tuple[str, int]
"""A projection, and an expert or EVERY_EXPERT."""

Put = Callable[[str, Tensor, int], None]
"""Writes a tensor, or the slice of it at an index."""

_HALVES = {"gate_up": (0, 2), "gate": (0, 1), "up": (1, 2)}
"""The halves of gate_up_proj that a projection holds."""


class Published:
    """The output of a merge.

    Attributes:
        files: dtype and shape of the tensors of every file.
        steps: the number of steps of :meth:`write`.
        is_decoded: whether quantized weights become bfloat16.

    Raises:
        AdapterError, CheckpointError: as in :func:`ktops.merge_adapter`.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.others = merged_tensors(checkpoint, adapter, decode=True)
        self.is_decoded = self.others.keys() != checkpoint.other_tensors().keys()
        self.files: dict[str, dict[str, Kind]] = defaultdict(dict)
        owners = {name.rpartition(".")[0]: view for name, view in reversed(checkpoint.tensors.items())}
        for name, tensor in self.others.items():
            view = checkpoint.tensors.get(name) or owners[name.rpartition(".")[0]]
            self.files[view.file.path.name][name] = tensor.dtype, tuple(tensor.shape)
        self.copies: list[tuple[str, View]] = []
        self.layers = [(layer, self._plan_layer(layer)) for layer in checkpoint.layers]
        self._place = {name: file for file, kinds in self.files.items() for name in kinds}

    @property
    def nbytes(self) -> int:
        kinds = (kind for kinds in self.files.values() for kind in kinds.values())
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds)

    @property
    def steps(self) -> int:
        return len(self.others) + len(self.copies) + 2 * sum(layer.num_experts for layer, _ in self.layers)

    def write(self, folder: Path, step: Step) -> None:
        """Writes all files."""
        with ExitStack() as stack:
            streams = {
                file: stack.enter_context(SafetensorsStream(folder / file, kinds))
                for file, kinds in self.files.items()
            }

            def put(name: str, tensor: Tensor, index: int) -> None:
                streams[self._place[name]].write(name, tensor, index)

            for name, tensor in (*self.others.items(), *self.copies):
                put(name, tensor.read(), 0)
                step(1)
            for layer, names in self.layers:
                self._write_layer(layer, names, put, step)

    def _plan_layer(self, layer: Layer) -> dict[Group, str]:
        """Adds the tensors of a layer to the files; returns the names of its weights."""
        layer.check()
        groups: dict[Group, dict[str, View]] = defaultdict(dict)
        for view in layer.tensors:
            key = self.checkpoint.keys[view.name]
            assert key is not None
            if is_of_activations(key.tensor):
                continue
            if key.tensor == "_extra_state":
                raise AdapterError(
                    f"{view}: {self.checkpoint.path} was written by ktops. Merge into the checkpoint that it "
                    "was converted from, or pass weight_format"
                )
            if key.tensor == "bias":
                self.files[view.file.path.name][view.name] = view.dtype, view.shape
                self.copies.append((view.name, view))
            else:
                groups[key.projection, key.expert][key.tensor] = view
        return {group: self._add_weight(layer, group, tensors) for group, tensors in groups.items()}

    def _add_weight(self, layer: Layer, group: Group, tensors: dict[str, View]) -> str:
        """Adds a weight to its file, in bfloat16 if it is quantized; returns its name."""
        projection, expert = group
        kind, view = next(iter(tensors.items()))
        is_quantized = tensors.keys() != {"weight"} or view.dtype not in PLAIN
        self.is_decoded |= is_quantized
        name = view.name
        if kind != "weight":
            name = name.removesuffix(kind).rstrip("._") + ("" if expert == EVERY_EXPERT else ".weight")
        halves = len(range(*_HALVES[projection])) if projection != "down" else 1
        shape: tuple[int, ...] = halves * layer.intermediate_size, layer.hidden_size
        shape = shape[::-1] if projection == "down" else shape
        if expert == EVERY_EXPERT:
            transposed = self._is_transposed(layer, is_quantized)
            shape = layer.num_experts, *(shape[::-1] if transposed else shape)
        self.files[view.file.path.name][name] = torch.bfloat16 if is_quantized else view.dtype, shape
        return name

    def _is_transposed(self, layer: Layer, is_quantized: bool) -> bool:
        """True if stacked weights are written as [E, in, out]: as before; if quantized, as in the model."""
        if not is_quantized or layer.module is None:
            return layer.transposed
        return self.adapter.base.experts[layer.module].transposed

    def _write_layer(self, layer: Layer, names: dict[Group, str], put: Put, step: Step) -> None:
        ordered = layer.ordered(CONCATENATED) if layer.gating == INTERLEAVED else layer
        for merged, projections in zip(
            merged_experts(ordered, self.adapter), (_HALVES, ("down",)), strict=True
        ):
            for expert in range(len(merged)):
                weight = merged.expert(expert).weight
                for projection in projections:
                    if (projection, expert) in names:
                        self._put(names[projection, expert], _part(layer, weight, projection), put, 0)
                    elif (projection, EVERY_EXPERT) in names:
                        part = _part(layer, weight, projection)
                        if projection == "gate_up" and layer.stored_gating == INTERLEAVED:
                            part = in_order(part, INTERLEAVED)
                        self._put(names[projection, EVERY_EXPERT], part, put, expert)
                step(1)

    def _put(self, name: str, weight: Tensor, put: Put, index: int) -> None:
        dtype, shape = self.files[self._place[name]][name]
        is_transposed = tuple(weight.shape) != shape[-2:]
        put(name, (weight.mT if is_transposed else weight).to(dtype), index)


def _part(layer: Layer, weight: Tensor, projection: str) -> Tensor:
    """Returns the rows of a projection, of gate_up_proj, up_proj or down_proj of an expert."""
    size = layer.intermediate_size
    if projection == "down" or layer.gating == UNGATED:
        return weight
    begin, end = _HALVES[projection]
    return weight[begin * size : end * size]
