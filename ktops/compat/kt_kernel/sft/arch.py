"""The names of KTransformers' module ``kt_kernel.sft.arch``: what MoE blocks are called, and errors."""

from dataclasses import dataclass

import torch
from torch import nn

from ktops.nn.find import find_experts


class KTAMXError(Exception):
    """The base of kt_kernel's errors."""


class KTAMXNotAvailableError(KTAMXError, RuntimeError):
    """The kernels are missing, or the CPU cannot run them."""


class KTAMXModelNotSupportedError(KTAMXError, ValueError):
    """The functions of kt_kernel do not know the model's architecture."""


class KTAMXConfigError(KTAMXError, ValueError):
    """A setting is missing or wrong."""


@dataclass
class MOEArchConfig:
    """How an architecture names the parts of its MoE blocks, and their sizes.

    Attributes:
        moe_layer_attr: the block in a decoder layer.
        router_attr, experts_attr: the router and the experts in the block.
        weight_names: gate, up and down of an expert, in checkpoints and in lists of experts.
        expert_num, intermediate_size, num_experts_per_tok: E, I, K.
        has_shared_experts: whether every token also passes through shared experts.
        router_type: "linear" or the kind of another router; informative, because the model's router runs.
    """

    moe_layer_attr: str
    router_attr: str
    experts_attr: str
    weight_names: tuple[str, str, str]
    expert_num: int
    intermediate_size: int
    num_experts_per_tok: int
    has_shared_experts: bool = False
    router_type: str = "linear"


@dataclass(frozen=True)
class _Names:
    """Where the configuration of an architecture has what MOEArchConfig holds."""

    expert_num: str = "n_routed_experts"
    intermediate_size: str = "moe_intermediate_size"
    shared: str | None = "n_shared_experts"
    router_type: str = "linear"
    weights: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


_QWEN = _Names("num_experts", shared="shared_expert_intermediate_size")
_DEEPSEEK = _Names(router_type="deepseek_gate")

ARCHITECTURES = {
    "DeepseekV2": _DEEPSEEK,
    "DeepseekV3": _DEEPSEEK,
    "DeepseekV4": _Names(router_type="precomputed"),
    "Kimi": _DEEPSEEK,
    "Qwen2Moe": _QWEN,
    "Qwen3Moe": _QWEN,
    "Qwen3VLMoe": _QWEN,
    "Qwen3_5Moe": _QWEN,
    "Glm4Moe": _Names(router_type="glm4_moe_gate"),
    "Mixtral": _Names("num_local_experts", "intermediate_size", None, weights=("w1", "w3", "w2")),
}
"""Parts of the names of the architectures that the functions of kt_kernel know."""


def get_moe_arch_config(config) -> MOEArchConfig:
    """Describes the MoE blocks of a model's configuration.

    Raises:
        KTAMXModelNotSupportedError: an architecture that kt_kernel does not know; the message lists them.

    Example:
        >>> get_moe_arch_config(AutoConfig.from_pretrained("Qwen/Qwen3-30B-A3B")).expert_num
        128
    """
    architecture = (getattr(config, "architectures", None) or [str(getattr(config, "model_type", ""))])[0]
    text = getattr(config, "text_config", None) or config
    names = next(
        (ARCHITECTURES[part] for part in ARCHITECTURES if _plain(part) in _plain(architecture)), None
    )
    if names is None or not hasattr(text, names.expert_num):
        raise KTAMXModelNotSupportedError(
            f"Model architecture {architecture} not supported for KTransformers: kt_kernel knows "
            f"{', '.join(ARCHITECTURES)}. ktops runs more models (docs/models.md): load the model with "
            'experts_implementation="ktops", or call ktops.swap_experts(model)'
        )
    shared = 0 if names.shared is None else getattr(text, names.shared, 0)
    return MOEArchConfig(
        moe_layer_attr="mlp",
        router_attr="gate",
        experts_attr="experts",
        weight_names=names.weights,
        expert_num=getattr(text, names.expert_num),
        intermediate_size=getattr(text, names.intermediate_size),
        num_experts_per_tok=text.num_experts_per_tok,
        has_shared_experts=bool(shared),
        router_type=names.router_type,
    )


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def get_moe_module(layer: nn.Module, moe_config: MOEArchConfig) -> nn.Module | None:
    """Returns the MoE block of a decoder layer; None if the layer is dense."""
    for name in (moe_config.moe_layer_attr, "block_sparse_moe"):
        block = getattr(layer, name, None)
        if block is not None and hasattr(block, moe_config.experts_attr):
            return block
    return None


def move_non_experts_to_gpu(
    model: nn.Module, moe_config: MOEArchConfig | None = None, device: str = "cuda:0"
) -> None:
    """Moves everything but the experts to a device."""
    experts = {id(part) for block in find_experts(model).values() for part in block.modules()}
    for module in model.modules():
        if id(module) not in experts:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def get_expert_device(model: nn.Module, moe_config: MOEArchConfig | None = None) -> str:
    """Returns the type of the device that holds the experts' weights, "unknown" without experts."""
    for block in find_experts(model).values():
        tensors: list[torch.Tensor] = [*block.parameters(), *block.buffers()]
        if tensors:
            return tensors[0].device.type
    return "unknown"
