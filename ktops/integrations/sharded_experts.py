"""Experts that transformers' ``DistributedConfig`` divides among processes, and LoRA on them.

With expert parallelism, a rank holds some experts as a whole; with tensor parallelism, some rows and columns
of every expert. LoRA factors are divided with the weights that they adapt: as
``torch.distributed.tensor.DTensor``, which optimizers, gradient clipping and PEFT's files understand.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

SHARDED = "its weights are sharded among processes"
"""Why experts stay as they are."""

_SHARDING = "_kt_sharding"
"""The attribute of an experts module that holds an ExpertSharding."""

MIN_PEFT = "0.21"
"""The first version of PEFT whose files hold the whole of a DTensor."""

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
        ranks = self.mesh["ep"].size()
        if self.num_experts % ranks:
            raise ValueError(
                f"DistributedConfig: ep_size must divide the {self.num_experts} experts of a layer, got "
                f"{ranks}"
            )
        count = self.num_experts // ranks
        first = self.mesh["ep"].get_local_rank() * count
        return range(first, first + count)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.mesh.mesh_dim_names or ()

    def placements_for(self, placement: "Placement") -> list["Placement"]:
        """Returns the placements along all dimensions of a tensor with this one along "ep" or "tp"."""
        from torch.distributed.tensor import Replicate

        return [Replicate() if name in _REPLICATING else placement for name in self._names]


def sharding_of(experts: nn.Module) -> ExpertSharding | None:
    """Returns how experts are divided among processes; None if every process has all of them."""
    return experts.__dict__.get(_SHARDING)


def set_sharding(experts: nn.Module, sharding: ExpertSharding) -> None:
    """Notes how experts are divided, for their adapters."""
    experts.__dict__[_SHARDING] = sharding


def why_sharded(experts: nn.Module) -> str | None:
    """Returns why experts cannot be replaced in this process if others have a part of them, else None."""
    if sharding_of(experts) is not None:
        return SHARDED
    if not torch.distributed.is_available() or "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        return SHARDED
    return None


def find_expert_mesh(model: nn.Module) -> "DeviceMesh | None":
    """Returns the mesh of the ranks that divide the experts of a transformers model among them.

    Dimensions with one rank are left out. None if every rank computes with all experts.
    """
    config, manager = distributed_config(model), getattr(model, "_mesh_manager", None)
    if config is None or manager is None or max(config.ep_size, config.tp_size) == 1:
        return None
    if config.ep_size > 1:
        sizes = {"dp_replicate": config.dp_replicate_size, "efsdp": config.efsdp_size, "ep": config.ep_size}
    else:
        sizes = {"dp_replicate": config.dp_replicate_size, "fsdp": config.fsdp_size, "tp": config.tp_size}
    return manager.get_mesh(tuple(name for name, size in sizes.items() if size > 1))


def distributed_config(model: nn.Module) -> Any:
    """Returns the DistributedConfig with which a model is loaded, or None."""
    return getattr(getattr(model, "config", None), "distributed_config", None)


def note_sharding(model: nn.Module, experts: nn.Module) -> None:
    """Notes how transformers has divided the Parameters of experts, if it has."""
    mesh = find_expert_mesh(model)
    if mesh is None or sharding_of(experts) is not None:
        return
    from torch.distributed.tensor import DTensor

    weight = experts._parameters.get("down_proj")
    if isinstance(weight, DTensor) and _sharding_dim(weight) is not None:
        named = experts._parameters.items()
        placements = {name: p.placements[_sharding_dim(p)] for name, p in named if isinstance(p, DTensor)}
        data_parallel_size = distributed_config(model).dp_size
        set_sharding(experts, ExpertSharding(mesh, weight.shape[0], data_parallel_size, placements))


def _sharding_dim(parameter: "DTensor") -> int | None:
    """Returns the dimension "ep" or "tp" of a Parameter's mesh.

    None if only FSDP2 shards it, for storage, as with ``tp_size`` for experts that have no rule for it.
    A mesh of one dimension may have no names.
    """
    names = parameter.device_mesh.mesh_dim_names
    if names is None:
        return 0
    return next((dim for dim, name in enumerate(names) if name in ("ep", "tp")), None)


class ExpertParallel:
    """Loads experts in formats by parts, one for each rank of a DistributedConfig with ``ep_size``.

    Args:
        model: being loaded, with its processes already known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._config = distributed_config(model)
        self._manager: Any = getattr(model, "_mesh_manager", None)
        mesh = find_expert_mesh(model)
        if mesh is None:
            raise ImportError(
                f"KTConfig: DistributedConfig(ep_size={self._config.ep_size}) needs a newer transformers, "
                "whose models know their processes. To upgrade: pip install -U transformers"
            )
        self._mesh = mesh

    @classmethod
    def of(cls, model: nn.Module) -> "ExpertParallel | None":
        """Returns None if every rank loads all experts."""
        config = distributed_config(model)
        return None if config is None or config.ep_size == 1 else cls(model)

    def local_experts(self, num_experts: int) -> range:
        """Returns the experts of this rank."""
        return self._sharding(num_experts).local_experts

    def install(self, experts: nn.Module, num_experts: int) -> None:
        """Makes experts of this rank exchange tokens with the others in forward.

        Args:
            num_experts: of all ranks.
        """
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

        set_sharding(experts, self._sharding(num_experts))
        ALL_PARALLEL_STYLES["ep_dispatch_experts"].install_forward(
            experts,
            ep_mesh=self._manager.get_mesh("ep"),
            tp_mesh=self._manager.get_mesh("tp"),
            ep_implementation=self._config.ep_implementation,
        )

    def _sharding(self, num_experts: int) -> ExpertSharding:
        return ExpertSharding(self._mesh, num_experts, self._config.dp_size, {})


def require_whole_experts(model: nn.Module) -> None:
    """Raises ValueError unless a DistributedConfig gives each rank whole experts, as those in formats are."""
    config = distributed_config(model)
    if config is None:
        return
    if config.ep_size == 1 and config.tp_size > 1:
        raise ValueError(
            f"KTConfig: DistributedConfig(tp_size={config.tp_size}) would divide the rows and columns of "
            "every expert, which ktops does not do to weights in formats. To give each process whole "
            f"experts: DistributedConfig(tp_size={config.tp_size}, ep_size={config.tp_size})"
        )
    if config.ep_size > 1:
        # transformers has nothing to divide: the placeholders of the experts have no Parameters
        plan = cast(Any, model)._ep_plan
        cast(Any, model)._ep_plan = {name: style for name, style in plan.items() if style != "grouped_gemm"}


def shard_factors(wrapper: "ParamWrapper", adapter: str) -> None:
    """Keeps this rank's part of the factors that PEFT has created for all experts.

    The ranks of a mesh take over the values of its first rank.
    """
    sharding = sharding_of(wrapper.get_base_layer())
    if sharding is None:
        return
    _require_peft()
    both = wrapper.lora_A, wrapper.lora_B
    for layers, placement in zip(both, _placements(wrapper, adapter), strict=True):
        whole = layers[adapter].weight
        local = _distribute(whole.detach(), sharding, placement)
        # not by setattr, which PEFT replaces for low_cpu_mem_usage by a function for plain Parameters
        layers[adapter]._parameters["weight"] = nn.Parameter(local, requires_grad=whole.requires_grad)


def _require_peft() -> None:
    """Raises ImportError unless PEFT saves and loads factors that are divided."""
    import peft
    from packaging.version import Version

    if Version(peft.__version__) < Version(MIN_PEFT):
        raise ImportError(
            f"LoRA on experts that are divided among processes needs peft>={MIN_PEFT}, found "
            f"{peft.__version__}. To upgrade: pip install -U peft"
        )


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
    dim = weight.dim % 3
    in_dim = 2 if getattr(wrapper, "_did_swap_in_out_features", False) else 1

    def along(dim: int) -> "Placement":
        if isinstance(weight, _StridedShard):
            return _StridedShard(dim, split_factor=weight.split_factor)
        return Shard(dim)

    return (along(1), Replicate()) if dim == in_dim else (Replicate(), along(0))


def _distribute(whole: Tensor, sharding: ExpertSharding, placement: "Placement") -> "DTensor":
    from torch.distributed.tensor import distribute_tensor

    source = None if whole.is_meta else 0
    return distribute_tensor(whole, sharding.mesh, sharding.placements_for(placement), src_data_rank=source)


def local_factors(wrapper: "ParamWrapper", adapter: str) -> tuple[Tensor, Tensor]:
    """Returns A [r * E, in] and B [out, r * E] of this rank's experts, in autograd."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    sharding = sharding_of(wrapper.get_base_layer())
    if sharding is None:
        return a, b
    return tuple(_Local.apply(factor, sharding.data_parallel_size) for factor in (a, b))


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
