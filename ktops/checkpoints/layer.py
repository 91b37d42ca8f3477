"""The experts of one layer of a checkpoint."""

import copy
from collections import defaultdict
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ktops._display import Step, no_step
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import Experts, Requantized, StoredExperts
from ktops.checkpoints.matrix import Matrix, expect, expect_dim
from ktops.checkpoints.names import EVERY_EXPERT, Key, summary
from ktops.checkpoints.packed import Tensors
from ktops.checkpoints.quantization_config import QuantizationConfig
from ktops.checkpoints.schemes import is_of_activations, matrices, own_layout, transposed
from ktops.checkpoints.stacking import Reordered, in_order, stack
from ktops.checkpoints.view import View
from ktops.formats import ExpertWeight, get_format
from ktops.formats.plain import PLAIN
from ktops.ops.activation import CONCATENATED, GATINGS, INTERLEAVED, UNGATED, ExpertFunction

PROJECTIONS = ("gate_up_proj", "down_proj")
"""The weights of the experts; without a gate, gate_up_proj is only up_proj."""

GATED = ("gate_up", "gate")


class LayerWeights(NamedTuple):
    """The experts of a layer, in the argument order of :meth:`ktops.nn.KTExperts.from_parameters`."""

    gate_up_proj: ExpertWeight
    down_proj: ExpertWeight
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None


class Layer:
    """The experts of one layer: knows where and in which scheme they are stored, and reads them.

    Attributes:
        name: name of the experts in the checkpoint, "model.layers.3.mlp.experts" or, in GGUF, "blk.3".
        index: the layer's number.
        module: the experts module that transformers would load them into, or None.
        tensors: all tensors of the experts.
        gating: the order in which gate and up are read, as in :func:`ktops.moe_sft`: the model's or, without
            a model, the file's. :meth:`ordered` returns the layer with another order.
        stored_gating: the order in the file; None if it is that of the model.
        transposed: whether stacked weights are stored as [E, in, out].
    """

    def __init__(self, name: str, index: int, keyed: dict[Key, View], config: QuantizationConfig) -> None:
        self.name, self.index = name, index
        self.tensors = list(keyed.values())
        key = next(iter(keyed))
        self.module = key.module
        self._config = config
        self._projections: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
        for key, view in keyed.items():
            if is_of_activations(key.tensor):
                continue
            self._projections[key.projection][key.expert][key.tensor] = view
        self.transposed = self._is_transposed()
        self._layouts = {key.layout for key in keyed}
        self.stored_gating = self._find_gating(key.gating)
        self.gating = key.gating or self.stored_gating or CONCATENATED

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.scheme}, {self.num_experts} experts)"

    @property
    def scheme(self) -> str:
        """The name of the checkpoint's storage scheme.

        Raises:
            CheckpointError: as in :meth:`check`.
        """
        return " and ".join(dict.fromkeys((self.gate_up_proj.scheme, self.down_proj.scheme)))

    @property
    def written_name(self) -> str:
        """The name under which ktops writes the experts: :attr:`name` if it ends in "experts"."""
        if self.name.rpartition(".")[2] == "experts":
            return self.name
        return self.module or f"model.layers.{self.index}.mlp.experts"

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of gate_up_proj and down_proj."""
        return self.gate_up_proj.format, self.down_proj.format

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down_proj.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down_proj.shape[2]

    @property
    def nbytes(self) -> int:
        """Size in memory in bytes, mapped or not, in the formats of the checkpoint."""
        return self.gate_up_proj.nbytes + self.down_proj.nbytes

    def ordered(self, gating: str) -> "Layer":
        """Returns this layer with another :attr:`gating`."""
        made = copy.copy(self)
        made.__dict__.pop("gate_up_proj", None)
        made.gating = gating
        return made

    @cached_property
    def gate_up_proj(self) -> StoredExperts:
        """gate_up_proj [E, 2I, H], its rows in the order of :attr:`gating`, or up_proj [E, I, H]."""
        stored = self._experts(*self._first_projections())
        stored = Reordered(stored, self.gating) if self._reorders else stored
        stored.gating = self.gating
        return stored

    @cached_property
    def down_proj(self) -> StoredExperts:
        """down_proj [E, H, I]."""
        return self._experts("down")

    def check(self) -> None:
        """Checks every tensor's name, dtype and shape, and the values of group indices and zero points.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or uses an unknown scheme; the
                message names it and the file.
        """
        num_experts, rows, hidden_size = self.gate_up_proj.shape
        per_column = ExpertFunction(gating=self.gating).rows(1)
        expected = num_experts, hidden_size, rows // per_column
        if rows % per_column or tuple(self.down_proj.shape) != expected:
            first = "up" if self.gating == UNGATED else "gate and up"
            raise CheckpointError(
                f"{self._any('down')}: must have shape {list(expected)} to match {first} of shape "
                f"{list(self.gate_up_proj.shape)}, got {list(self.down_proj.shape)}"
            )
        for name in PROJECTIONS:
            self._bias_views(name)

    def experts(
        self, weight_format: str | None = None, *, group_size: int | None = None, method: str = "rtn"
    ) -> tuple[Experts, Experts]:
        """Returns the weights of :attr:`gating`, which quantize while reading if weight_format is given.

        Args:
            weight_format: None keeps the formats of the checkpoint.
            group_size, method: as in :func:`ktops.quantize`.

        Raises:
            CheckpointError: as in :meth:`check`; weight_format is None and the experts have several formats.
            ValueError: the format cannot hold these weights.
        """
        self.check()
        stored = self.gate_up_proj, self.down_proj
        if weight_format is None:
            for experts in stored:
                if experts.refusal is not None:
                    raise CheckpointError(experts.refusal)
            return stored
        gate_up, down = (_in_format(experts, weight_format, group_size, method) for experts in stored)
        return gate_up, down

    def read(
        self,
        weight_format: str | None = None,
        *,
        group_size: int | None = None,
        method: str = "rtn",
        dtype: torch.dtype = torch.bfloat16,
        step: Step = no_step,
    ) -> LayerWeights:
        """Reads the experts, or maps them where the bytes of the file can be used directly.

        Args:
            weight_format, group_size, method: as in :func:`ktops.load_experts`.
            dtype: the dtype to compute in, and the dtype of the biases.
            step: called with the number of newly read experts, counted once per projection.

        Raises:
            CheckpointError, ValueError: as in :meth:`experts`.
        """
        gate_up, down = self.experts(weight_format, group_size=group_size, method=method)
        biases = (self.bias(name, dtype) for name in PROJECTIONS)
        return LayerWeights(gate_up.read(dtype, step), down.read(dtype, step), *biases)

    def has_bias(self, name: str) -> bool:
        """True if "gate_up_proj" or "down_proj" has a bias."""
        return self._bias_views(name) is not None

    def bias(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Returns the bias of "gate_up_proj" [E, 2I] or "down_proj" [E, H]; None if it has none."""
        parts = self._bias_views(name)
        if parts is None:
            return None
        biases = [torch.cat([view.read() for view in views]).to(dtype) for views in parts]
        if name == "gate_up_proj" and self._reorders:
            biases = [in_order(bias, self.gating) for bias in biases]
        return torch.stack(biases)

    def _bias_views(self, name: str) -> list[list[View]] | None:
        """Returns the biases of each expert's matrices, checked; None if there are none."""
        parts = ("down",) if name == "down_proj" else self._first_projections()
        rows = getattr(self, name).shape[1] // len(parts)
        found = [
            [tensors.get("bias") for tensors in experts]
            for experts in zip(*(self._of_experts(part) for part in parts), strict=True)
        ]
        given = [view for views in found for view in views if view is not None]
        if not given:
            return None
        if len(given) != len(found) * len(parts):
            raise CheckpointError(f"{given[0]}: some experts or projections have no bias")
        for view in given:
            expect(view, (rows,), *PLAIN)
        return found

    def _first_projections(self) -> tuple[str, ...]:
        """Returns the projections that hold the rows of gate_up_proj.

        Raises:
            CheckpointError: there is a gate, but the experts of the model have none.
        """
        if self.gating == UNGATED:
            gate = next((name for name in GATED if name in self._projections), None)
            if gate is not None:
                raise CheckpointError(f"{self._any(gate)}: the experts of the model have no gate projection")
            return ("up",)
        return ("gate_up",) if "gate_up" in self._projections else ("gate", "up")

    @property
    def _reorders(self) -> bool:
        """True if gate and up rows are read in another order than that of the file."""
        return self.stored_gating not in (None, self.gating)

    def _any(self, projection: str) -> View:
        tensors = next(iter(self._projections[projection].values()))
        return tensors.get("weight") or next(iter(tensors.values()))

    def _experts(self, *projections: str) -> StoredExperts:
        for layout in self._layouts - {*GATINGS, None}:
            raise CheckpointError(
                f"{self.tensors[0]}: unknown scheme: transformers loads {self.module} with the operation "
                f"{layout}, which ktops does not support"
            )
        for projection in projections:
            if projection not in self._projections:
                known = self.tensors[0]
                raise CheckpointError(
                    f"{self.name}: the {projection} projection of the experts is missing, though there is "
                    f"{known}; the names are {summary(view.name for view in self.tensors)}"
                )
        tensors = [self._of_experts(projection) for projection in projections]
        if len({len(of_experts) for of_experts in tensors}) > 1:
            sizes = " and ".join(f"{len(t)} of {p}" for t, p in zip(tensors, projections, strict=True))
            raise CheckpointError(
                f"{self._any(projections[0])}: projections have different numbers of experts: {sizes}"
            )
        flat = [_without_bias(part) for of_experts in tensors for part in of_experts]
        if not all(flat):
            raise CheckpointError(f"{self._any(projections[0])}: has a bias but no weight")
        made = self._matrices(flat, projections)
        count = len(tensors[0])
        parts = [made[first : first + count] for first in range(0, len(made), count)]
        return stack([list(of_expert) for of_expert in zip(*parts, strict=True)])

    def _matrices(self, tensors: list[Tensors], projections: tuple[str, ...]) -> list[Matrix]:
        """Returns the matrices of all experts of one projection, then those of the next."""
        if self.transposed and projections != ("gate", "up"):
            made = [transposed(part) for part in tensors]
        else:
            moved = self._reorders and projections != ("down",)
            made = matrices(tensors, self._config, stacked=len(projections) > 1, moved=moved)
        return made

    def _find_gating(self, of_model: str | None) -> str | None:
        """Returns the order of gate and up in the file; None if it is the model's, whatever that is."""
        if not any(name in self._projections for name in GATED):
            return UNGATED
        gate_up = self._projections.get("gate_up", {}).get(EVERY_EXPERT)
        if gate_up is None:
            return CONCATENATED
        state = gate_up.get("_extra_state")
        if state is not None:
            metadata = state.file.metadata
            return metadata.get("gating", CONCATENATED) if "ktops" in metadata else of_model
        for known in (INTERLEAVED, CONCATENATED):
            if known in self._layouts:
                return known
        alternating = "blocks" in gate_up or (self.transposed and "bias" in gate_up)
        return INTERLEAVED if alternating else CONCATENATED

    def _is_transposed(self) -> bool:
        """True if fused weights are [E, H, 2I] and [E, I, H], by their shapes."""
        both = [self._projections.get(name, {}).get(EVERY_EXPERT, {}) for name in ("gate_up", "down")]
        if any("weight" not in t or "_extra_state" in t or t["weight"].dim != 3 for t in both):
            return False
        gate_up, down = (tensors["weight"].shape for tensors in both)
        return gate_up[2] == 2 * down[1] and gate_up[1] == down[2]

    def _of_experts(self, projection: str) -> list[Tensors]:
        """Returns the tensors of every expert, as slices if they are stacked."""
        experts = self._projections[projection]
        if EVERY_EXPERT in experts:
            if len(experts) > 1:
                raise CheckpointError(
                    f"{self._any(projection)}: some experts share a tensor, but others have their own"
                )
            return _slices(experts[EVERY_EXPERT])
        last = max(experts)
        for expert in range(last + 1):
            if expert not in experts:
                known = experts[last].get("weight") or next(iter(experts[last].values()))
                raise CheckpointError(
                    f"{self.name}.{expert}: the {projection} projection is missing in "
                    f"{known.file.path.parent}, though there is {known}"
                )
        return [experts[expert] for expert in range(last + 1)]


def _without_bias(tensors: Tensors) -> Tensors:
    return {name: view for name, view in tensors.items() if name != "bias"}


def _slices(tensors: Tensors) -> list[Tensors]:
    """Returns the tensors of each expert, sliced from those that hold all experts."""
    state, shape = tensors.get("_extra_state"), tensors.get("weight_shape")
    own = {} if state is None else {"_extra_state": state}
    if shape is not None and shape.dim == 1:  # one for all experts, or one row per expert
        own["weight_shape"] = shape.tail(2)
    stacked = {name: view for name, view in tensors.items() if name not in own}
    if not stacked:
        raise CheckpointError(f"{state or shape}: its weight is missing")
    (first, *_) = stacked.values()
    for view in stacked.values():
        if not view.dim or not view.nbytes:
            what = f"unknown scheme: ktops has no format for {view.blocks}" if view.blocks else "it is empty"
            raise CheckpointError(f"{view}: {what}, shape {list(view.weights_shape)}")
    sizes = {view.shape[0] for view in stacked.values()}
    if len(sizes) > 1:
        shapes = ", ".join(f"{name} {list(view.weights_shape)}" for name, view in stacked.items())
        raise CheckpointError(f"{first}: tensors have different numbers of experts: {shapes}")
    (count,) = sizes
    if state is not None:
        expect_dim(state, 1)
        layout = own_layout(state)
        if layout["shape"][0] != count:
            raise CheckpointError(f"{first}: must have {layout['shape'][0]} experts, got {count}")
    return [{name: view.select(i) for name, view in stacked.items()} | own for i in range(count)]


def _in_format(experts: Experts, weight_format: str, group_size: int | None, method: str) -> Experts:
    if experts.format == weight_format and group_size in (None, experts.group_size):
        get_format(weight_format).check_settings(group_size, method)
        return experts
    return Requantized(experts, weight_format, group_size, method)
