"""MoE blocks that run their experts through the op with adapters, under KTransformers' names.

A wrapper takes the place of a block and shares its children, so that the router, the shared experts and the
names of all parameters stay the model's own.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ktops.compat import lora
from ktops.compat.sft import SFTWrapper
from ktops.formats import ExpertWeight
from ktops.nn.experts import KTExperts
from ktops.nn.host_memory import StaysOnCPU


class Adapters(StaysOnCPU, nn.ParameterDict):
    """The six adapter tensors of a layer's experts, by the names in ``lora.NAMES``."""


def create_lora_params(
    expert_num: int,
    hidden_size: int,
    intermediate_size: int,
    lora_rank: int,
    lora_alpha: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, nn.Parameter]:
    """Returns new adapters for the experts of a layer: A from a uniform distribution, B zero.

    Args:
        expert_num, hidden_size, intermediate_size, lora_rank: E, H, I, r.
        lora_alpha: unused here; the scaling lora_alpha / lora_rank is an attribute of the layer.
        device, dtype: of the Parameters.

    Returns:
        gate_lora_a, up_lora_a [E, r, H], gate_lora_b, up_lora_b [E, I, r], down_lora_a [E, r, I] and
        down_lora_b [E, H, r].

    Example:
        >>> create_lora_params(8, 64, 32, lora_rank=4, lora_alpha=8)["down_lora_b"].shape
        torch.Size([8, 64, 4])
    """
    params = {}
    for name, shape in lora.shapes(expert_num, hidden_size, intermediate_size, lora_rank).items():
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        if name.endswith("_a"):
            for expert in tensor:  # the fan-in is that of one expert's matrix
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        params[name] = nn.Parameter(tensor)
    return params


class AdaptedExperts(StaysOnCPU, KTExperts):
    """Experts whose forward adds the adapters that a :class:`MoELayer` has set.

    Hidden states may be on another device; the output is on that device.
    """

    adapters: "tuple[Adapters, float] | None" = None
    """The adapter tensors by name, and their scaling."""

    switches: tuple[nn.Module, ...] = ()
    """Layers of PEFT; while their adapters are disabled, these adapters are too."""

    has_run: bool = False
    """Whether forward has been called."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **given) -> Tensor:
        """Runs the experts; see :meth:`ktops.nn.KTExperts.forward`."""
        self.has_run = True
        if self.adapters is not None and not any(layer.disable_adapters for layer in self.switches):
            params, scaling = self.adapters
            given |= lora.arguments(dict(params), scaling)
        return super().forward(hidden_states, top_k_index, top_k_weights, **given)


class MoELayer(nn.Module):
    """Replaces a MoE block whose experts are an :class:`AdaptedExperts`, or become one.

    Args:
        original_moe: the block, with children ``experts`` and the router; it keeps working, on the same
            children.
        backend: the experts' weights, as ``KTMoEWrapper(mode="sft")`` holds them.
        lora_params: six Parameters by name (``create_lora_params``); None for none yet.
        moe_config: an MOEArchConfig.
        hidden_size: H.
        layer_idx: the number of the layer.

    Raises:
        RuntimeError: the backend has no weights.
        TypeError: adapters that are not Parameters, which would not train.
        ValueError: adapters with other names or shapes.
    """

    lora_params: Adapters | None

    def __init__(
        self,
        original_moe: nn.Module,
        backend: SFTWrapper,
        lora_params: Mapping[str, nn.Parameter] | None,
        moe_config,
        hidden_size: int,
        layer_idx: int,
    ) -> None:
        super().__init__()
        backend._check_loaded()
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry] = original_moe.__dict__[registry]
        self.__dict__["original_moe"] = original_moe
        self.training = original_moe.training
        self.backend = backend
        self.moe_config = moe_config
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx
        if not isinstance(self.experts, AdaptedExperts):
            self._modules["experts"] = experts_of(backend).train(original_moe.training)
        own = {name: getattr(backend, name) for name in lora.NAMES}
        if lora_params is None and None not in own.values():
            lora_params = own
        self.set_adapters(lora_params)

    @property
    def experts(self) -> AdaptedExperts:
        """The experts, which hold the weights."""
        experts = self._modules["experts"]
        return cast(AdaptedExperts, getattr(experts, "stacked", experts))

    @property
    def router(self) -> nn.Module:
        """The model's own router."""
        return getattr(self.original_moe, self.moe_config.router_attr)

    def set_adapters(self, lora_params: Mapping[str, nn.Parameter] | None) -> None:
        """Makes these Parameters the experts' adapters and registers them as ``lora_params``.

        Raises:
            TypeError: a tensor is not a Parameter.
            ValueError: a missing or unknown name, or a wrong shape.
        """
        if lora_params is None or not self.backend.trains_lora:
            self._modules.pop("lora_params", None)
            self.__dict__["lora_params"] = None
            self.experts.adapters = None
            return
        given = dict(lora_params)
        experts = self.experts
        sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size, self.backend.lora_rank
        expected = lora.shapes(*sizes)
        if given.keys() != expected.keys():
            raise ValueError(f"lora_params must have the names {', '.join(expected)}, got {', '.join(given)}")
        for name, shape in expected.items():
            tensor = given[name]
            if not isinstance(tensor, nn.Parameter):
                raise TypeError(f"lora_params: {name} must be an nn.Parameter, got {type(tensor).__name__}")
            if list(tensor.shape) != shape:
                raise ValueError(f"lora_params: {name} must have shape {shape}, got {list(tensor.shape)}")
        self.__dict__.pop("lora_params", None)
        self.lora_params = Adapters([(name, given[name]) for name in lora.NAMES])
        experts.adapters = self.lora_params, self.backend.lora_scaling

    def forward(self, *args, **kwargs):
        """Runs the block: its router, its experts and its shared experts."""
        return self.original_moe(*args, **kwargs)

    def update_lora_pointers(self) -> None:
        """Has nothing to update: every forward reads the adapters, even if changed through ``.data``."""

    def train(self, mode: bool = True):
        cast(nn.Module, self.original_moe).training = mode
        return super().train(mode)


def adapted_experts(experts: KTExperts) -> AdaptedExperts:
    """Returns experts that hold the same weights, frozen and not copied."""
    first, down = _frozen(getattr(experts, experts.function.first_name)), _frozen(experts.down_proj)
    biases = experts.layout.biases(experts)
    adapted = AdaptedExperts.from_parameters(first, down, *biases, **experts.options)
    return cast(AdaptedExperts, adapted.requires_grad_(False).train(experts.training))


def experts_of(backend: SFTWrapper) -> AdaptedExperts:
    """Returns experts that hold the weights of a wrapper, not copied."""
    assert backend.gate_up_proj is not None and backend.down_proj is not None
    weights = _frozen(backend.gate_up_proj), _frozen(backend.down_proj)
    return cast(AdaptedExperts, AdaptedExperts.from_parameters(*weights, **backend.function._asdict()))


def _frozen(weight: Tensor | ExpertWeight) -> nn.Parameter | ExpertWeight:
    return weight if isinstance(weight, ExpertWeight) else nn.Parameter(weight.detach(), False)
