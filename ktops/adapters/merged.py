"""Weights of a checkpoint with the updates of an adapter added, in float32 and rounded once."""

from functools import cached_property

import torch
from torch import Tensor

from ktops.adapters.adapter import Adapter
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import Factors
from ktops.adapters.peft_files import PREFIX, TOKENS
from ktops.checkpoints.checkpoint import Checkpoint
from ktops.checkpoints.config import CODE_DTYPES, FROM_QUANTIZER
from ktops.checkpoints.experts import Experts, FileExperts, StoredExperts, float_rows
from ktops.checkpoints.layer import Layer
from ktops.checkpoints.new_file import LazyTensor
from ktops.checkpoints.schemes import is_of_activations, matrices
from ktops.checkpoints.stacking import in_order
from ktops.checkpoints.view import View
from ktops.formats import Codes
from ktops.nn.find import without_base_layer
from ktops.ops.activation import INTERLEAVED, UNGATED


class MergedExperts(Experts):
    """The experts of a projection in float32, with the update of an adapter.

    Args:
        source: gate_up_proj, up_proj or down_proj of a checkpoint.
        update: its update, with the rows of gate before those of up; None for none.
        gating: the order of the rows in source.
    """

    format, group_size = "fp32", 0

    def __init__(self, source: StoredExperts, update: Factors | None, gating: str | None = None) -> None:
        self.source, self.update, self.gating = source, update, gating
        self.shape = source.shape
        self._unread = set(range(len(self)))

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.update is not None
        a, b = self.update.load()
        return a.float(), self.update.scaling * b.float()

    def expert(self, index: int) -> Codes:
        weight = torch.cat(list(float_rows(self.source, index)))
        if self.update is not None:
            a, b = (factor[index] for factor in self._factors)
            weight += (in_order(b, INTERLEAVED) if self.gating == INTERLEAVED else b) @ a
            self._unread.discard(index)
            if not self._unread:
                self.__dict__.pop("_factors", None)
        return Codes(weight)

    def name(self, index: int) -> str:
        return self.source.name(index)


def merged_experts(layer: Layer, adapter: Adapter) -> tuple[MergedExperts, MergedExperts]:
    """Returns gate_up_proj (or up_proj) and down_proj of a layer, in its order of rows."""
    layer.check()
    first, down = None, None
    if layer.module in adapter.experts:
        assert layer.module is not None
        first = adapter.projection(layer.module, "up" if layer.gating == UNGATED else "gate_up")
        down = adapter.projection(layer.module, "down")
    return MergedExperts(layer.gate_up_proj, first, layer.gating), MergedExperts(layer.down_proj, down)


def merged_tensors(checkpoint: Checkpoint, adapter: Adapter, *, decode: bool) -> dict[str, View | LazyTensor]:
    """Returns the tensors other than the experts, with the adapter's updates.

    Args:
        decode: replace quantized weights by their values in bfloat16.

    Raises:
        AdapterError: the checkpoint lacks a weight that the adapter changes, or it is quantized and decode is
            False.
        CheckpointError: ktops cannot decode a weight.
    """
    others = checkpoint.other_tensors()
    replaced = {without_base_layer(key.removeprefix(PREFIX)): view for key, view in adapter.others.items()}
    _require_mergeable(adapter, replaced)
    updates = dict(adapter.weights)
    found: dict[str, View | LazyTensor] = {}
    quantized = _quantized(others)
    for name, view in others.items():
        owner = name.rpartition(".")[0]
        tensors = quantized.get(owner)
        module = _module(f"{owner}.weight", adapter)
        if tensors is not None and decode:
            if next(iter(tensors.values())) is view:
                update = updates.pop(module, None) if module else None
                found[f"{owner}.weight"] = _decoded(tensors, checkpoint, update)
            continue
        found[name] = view
        if name.endswith(".weight") and module in updates:
            if tensors is not None:
                raise AdapterError(
                    f"{view}: is quantized, so the adapter's update of {module} cannot be added. Leave out "
                    "weight_format, to get all weights in bfloat16"
                )
            found[name] = _updated(view, updates.pop(module), module in adapter.base.embeddings)
        elif (key := _key_of(name, replaced, adapter)) is not None:
            found[name] = _replacement(view, replaced.pop(key))
    _require_used(checkpoint, [f"{name}.weight" for name in updates], list(replaced))
    return found


def _require_mergeable(adapter: Adapter, replaced: dict[str, View]) -> None:
    for name, view in replaced.items():
        if name.endswith(TOKENS):
            raise AdapterError(f"{view}: rows trained by trainable_token_indices cannot be merged")
    changed = replaced.keys() | {f"{name}.weight" for name in adapter.weights}
    for names in adapter.base.tied.items():
        if both := changed.intersection(names):
            raise AdapterError(
                f"{adapter.path}: changes {' and '.join(sorted(both))}, but {' and '.join(names)} are one "
                f"weight in {adapter.base.where}, so a merge cannot change them as the adapter does"
            )


def _require_used(checkpoint: Checkpoint, updates: list[str], replaced: list[str]) -> None:
    if updates:
        raise AdapterError(f"{checkpoint.path}: has no {updates[0]} of its own, which the adapter changes")
    if replaced:
        raise AdapterError(f"{checkpoint.path}: has no {replaced[0]}, which the adapter replaces")


def _module(name: str, adapter: Adapter) -> str | None:
    """Returns the module of the model that holds a weight of a checkpoint."""
    module = adapter.base.weight_named(name.removesuffix(".weight"))
    if module is not None:
        return module
    renamed = adapter.base.names.renamed(name).removesuffix(".weight")
    return renamed if renamed in adapter.base.weights else None


def _key_of(name: str, replaced: dict[str, View], adapter: Adapter) -> str | None:
    if name in replaced:
        return name
    renamed = adapter.base.names.renamed(name) if replaced else name
    return renamed if renamed in replaced else None


def _quantized(others: dict[str, View]) -> dict[str, dict[str, View]]:
    """Returns the tensors of every quantized weight by the name of its module."""
    owners: dict[str, dict[str, View]] = {}
    for name, view in others.items():
        owner, _, tensor = name.rpartition(".")
        owners.setdefault(owner, {})[tensor] = view
    return {
        owner: {
            tensor: view
            for tensor, view in tensors.items()
            if tensor != "bias" and not is_of_activations(tensor)
        }
        for owner, tensors in owners.items()
        if any(
            tensor in FROM_QUANTIZER or (tensor == "weight" and view.dtype in CODE_DTYPES)
            for tensor, view in tensors.items()
        )
    }


def _decoded(tensors: dict[str, View], checkpoint: Checkpoint, update: Factors | None) -> LazyTensor:
    (matrix,) = matrices([tensors], checkpoint.quantization, stacked=False)
    experts = FileExperts([[matrix]])
    return LazyTensor(
        torch.bfloat16,
        experts.shape[1:],
        lambda: _sum(torch.cat(list(float_rows(experts, 0))), update).bfloat16(),
    )


def _updated(view: View, update: Factors, transposed: bool) -> LazyTensor:
    return LazyTensor(view.dtype, view.shape, lambda: _sum(view.read(), update, transposed).to(view.dtype))


def _sum(weight: Tensor, update: Factors | None, transposed: bool = False) -> Tensor:
    if update is None:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(dtype) for factor in update.load())
    delta = (update.scaling * b) @ a
    return weight.to(dtype) + (delta.mT if transposed else delta)


def _replacement(view: View, other: View) -> LazyTensor:
    if other.shape != view.shape:
        raise AdapterError(
            f"{other}: must have shape {list(view.shape)} like {view}, got {list(other.shape)}"
        )
    return LazyTensor(view.dtype, view.shape, lambda: other.read().to(view.dtype))
