"""Experts that transformers' ``DistributedConfig`` divides among processes, and LoRA on them.

With expert parallelism, a rank holds some experts as a whole; with tensor parallelism, some rows and columns
of every expert. LoRA factors are divided with the weights that they adapt: as
``torch.distributed.tensor.DTensor``, which optimizers, gradient clipping and PEFT's files understand.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_SHARDING = "_kt_sharding"
"""The attribute of an experts module that holds an ExpertSharding."""

_REPLICATING = ("dp_replicate", "fsdp", "efsdp")
"""Dimensions of a mesh along which ranks compute with the same weights, on different tokens."""


@dataclass(frozen=True)
class ExpertSharding:
    """How the experts of a layer are divided among the ranks that compute them.

    Attributes:
        mesh: the ranks: along "ep" or "tp", each computes a part of the experts; along the other dimensions,
            each has tokens of its own.
        num_experts: of all ranks.
        data_parallel_size: number of ranks whose losses are averaged.
        placements: name of a weight -> how it is divided along "ep" or "tp".
    """

    mesh: "DeviceMesh"
    num_experts: int
    data_parallel_size: int
    placements: dict[str, "Placement"]

    @property
    def is_expert_parallel(self) -> bool:
        """Whether each rank has whole experts."""
        return "ep" in self._names

    @property
    def local_experts(self) -> range:
        """The experts of this rank."""
        if not self.is_expert_parallel:
            return range(self.num_experts)
        count = self.num_experts // self.mesh["ep"].size()
        first = self.mesh["ep"].get_local_rank() * count
        return range(first, first + count)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.mesh.mesh_dim_names or ()

    def over(self, dividing: "Placement") -> list["Placement"]:
        """Returns the placements along all dimensions of a tensor that is divided along "ep" or "tp" so."""
        from torch.distributed.tensor import Replicate

        return [Replicate() if name in _REPLICATING else dividing for name in self._names]


def sharding_of(experts: nn.Module) -> ExpertSharding | None:
    """Returns how experts are divided among processes; None if every process has all of them."""
    return experts.__dict__.get(_SHARDING)


def set_sharding(experts: nn.Module, sharding: ExpertSharding) -> None:
    """Notes how experts are divided, for their adapters."""
    experts.__dict__[_SHARDING] = sharding


def find_sharding(model: nn.Module) -> "tuple[DeviceMesh, int] | None":
    """Returns the mesh that divides the experts of a transformers model, and its data-parallel size.

    Dimensions with one rank are left out. None if no rank has only a part of the experts.
    """
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    manager = getattr(model, "_mesh_manager", None)
    if config is None or manager is None or max(config.ep_size, config.tp_size) == 1:
        return None
    if config.ep_size > 1:
        sizes = {"dp_replicate": config.dp_replicate_size, "efsdp": config.efsdp_size, "ep": config.ep_size}
    else:
        sizes = {"dp_replicate": config.dp_replicate_size, "fsdp": config.fsdp_size, "tp": config.tp_size}
    names = tuple(name for name, size in sizes.items() if size > 1)
    return manager.get_mesh(names), config.dp_size


def note_sharding(model: nn.Module, experts: nn.Module) -> None:
    """Notes how transformers has divided the Parameters of experts, if it has."""
    from torch.distributed.tensor import DTensor

    found = find_sharding(model)
    weight = experts._parameters.get("down_proj")
    if found is None or not isinstance(weight, DTensor) or sharding_of(experts) is not None:
        return
    mesh, data_parallel_size = found
    placements = {
        name: _dividing(parameter)
        for name, parameter in experts._parameters.items()
        if isinstance(parameter, DTensor)
    }
    set_sharding(experts, ExpertSharding(mesh, weight.shape[0], data_parallel_size, placements))


def _dividing(parameter: "DTensor") -> "Placement":
    """Returns how a Parameter is divided along "ep" or "tp"; meshes of one dimension may have no names."""
    names = parameter.device_mesh.mesh_dim_names
    if names is None:
        return parameter.placements[-1]
    return parameter.placements[next(i for i, name in enumerate(names) if name in ("ep", "tp"))]


def shard_factors(wrapper: "ParamWrapper", adapter: str) -> None:
    """Keeps this rank's part of the factors that PEFT has created for all experts.

    The ranks of a mesh take over the values of its first rank.
    """
    sharding = sharding_of(wrapper.get_base_layer())
    if sharding is None:
        return
    for layers, placement in zip((wrapper.lora_A, wrapper.lora_B), _placements(wrapper, adapter), strict=True):
        whole = layers[adapter].weight
        local = _distribute(whole.detach(), sharding, placement)
        layers[adapter].weight = nn.Parameter(local, requires_grad=whole.requires_grad)


def _placements(wrapper: "ParamWrapper", adapter: str) -> tuple["Placement", "Placement"]:
    """Returns how A [r * E, in] and B [out, r * E] are divided along "ep" or "tp"."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    sharding = sharding_of(wrapper.get_base_layer())
    assert sharding is not None
    if sharding.is_expert_parallel:
        # A has the expert outermost; B innermost, so that a rank has a part of each of r groups of columns
        return Shard(0), _StridedShard(1, split_factor=wrapper.r[adapter])
    weight = sharding.placements[wrapper.parameter_name]
    dim = weight.dim % 3  # type: ignore[attr-defined]
    in_dim = 2 if getattr(wrapper, "_did_swap_in_out_features", False) else 1

    def along(dim: int) -> "Placement":
        if isinstance(weight, _StridedShard):
            return _StridedShard(dim, split_factor=weight.split_factor)
        return Shard(dim)

    return (along(1), Replicate()) if dim == in_dim else (Replicate(), along(0))


def _distribute(whole: Tensor, sharding: ExpertSharding, placement: "Placement") -> "DTensor":
    from torch.distributed.tensor import distribute_tensor

    source = None if whole.is_meta else 0
    return distribute_tensor(whole, sharding.mesh, sharding.over(placement), src_data_rank=source)


def local_factors(wrapper: "ParamWrapper", adapter: str) -> tuple[Tensor, Tensor]:
    """Returns A [r * E, in] and B [out, r * E] of this rank's experts, in autograd."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    sharding = sharding_of(wrapper.get_base_layer())
    if sharding is None:
        return a, b
    return tuple(_Local.apply(factor, sharding.data_parallel_size) for factor in (a, b))  # type: ignore


class _Local(torch.autograd.Function):
    """Returns this rank's part of a DTensor. Backward averages the gradient over the ranks with other tokens,
    and adds up those of ranks that have the same factor and a part of the weights.
    """

    @staticmethod
    def forward(ctx: Any, factor: "DTensor", data_parallel_size: int) -> Tensor:
        ctx.factor, ctx.data_parallel_size = factor, data_parallel_size
        return factor.to_local().view_as(factor.to_local())

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        from torch import distributed
        from torch.distributed.tensor import DTensor

        factor, grad = ctx.factor, grad.clone(memory_format=torch.contiguous_format)
        for dim, placement in enumerate(factor.placements):
            if placement.is_replicate():
                distributed.all_reduce(grad, group=factor.device_mesh.get_group(dim))
        if ctx.data_parallel_size > 1:
            grad /= ctx.data_parallel_size
        whole = DTensor.from_local(
            grad,
            factor.device_mesh,
            factor.placements,
            run_check=False,
            shape=factor.shape,
            stride=factor.stride(),
        )
        return whole, None


def shape_of_all(experts: nn.Module, weight: Tensor) -> torch.Size:
    """Returns the shape of a weight with the experts of all ranks."""
    sharding = sharding_of(experts)
    if sharding is None or not sharding.is_expert_parallel:
        return weight.shape
    return torch.Size((sharding.num_experts, *weight.shape[1:]))
