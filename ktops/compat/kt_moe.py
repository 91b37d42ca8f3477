"""The names of the module ``llamafactory.model.model_utils.kt_moe`` in KTransformers' usage document.

They load and wrap a model whose experts have adapters of their own, outside of PEFT. New code uses PEFT:
docs/peft.md.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ktops.compat import lora
from ktops.compat.kt_kernel.sft.arch import (
    KTAMXConfigError,
    KTAMXError,
    KTAMXModelNotSupportedError,
    KTAMXNotAvailableError,
    MOEArchConfig,
    get_moe_arch_config,
    get_moe_module,
)
from ktops.compat.kt_kernel.sft.layer import KTMoELayerWrapper
from ktops.compat.kt_kernel.sft.wrapper import get_kt_loading_kwargs
from ktops.compat.kt_kernel_ext import CPUInfer, WorkerPoolConfig
from ktops.compat.layer import create_lora_params
from ktops.compat.sft import SFTWrapper
from ktops.compat.wrapping import (
    kt_value,
    load_model,
    settings_of,
    use_threads,
    warn_without_amx,
    wrap_layers,
    wrappers_of,
)

__all__ = [
    "KTAMXConfigError",
    "KTAMXError",
    "KTAMXModelNotSupportedError",
    "KTAMXNotAvailableError",
    "MOEAMXFunction",
    "MOEArchConfig",
    "MOELayerWrapper",
    "create_lora_params",
    "get_kt_lora_params",
    "get_moe_arch_config",
    "get_moe_module",
    "init_cpu_infer",
    "load_kt_model",
    "update_kt_lora_pointers",
    "wrap_moe_layers_with_amx",
]

KT_KERNEL_AVAILABLE = True


class MOEAMXFunction:
    """The experts of a layer as a function of the router's logits, which autograd differentiates.

    The routing weights are the softmax of the logits, restricted to the largest and normalized. That is the
    routing of Qwen and Mixtral; :class:`MOELayerWrapper` runs the model's own router instead.
    """

    @staticmethod
    def apply(
        hidden_states: Tensor,
        router_logits: Tensor,
        moe_amx: SFTWrapper,
        cpu_infer: CPUInfer | None,
        lora_params: Mapping[str, Tensor],
        moe_config: MOEArchConfig | None,
        hidden_size: int,
        num_experts_per_tok: int,
    ) -> Tensor:
        """Runs the experts.

        Args:
            hidden_states: [..., H], on any device.
            router_logits: [..., E].
            moe_amx: the experts, ``KTMoEWrapper(mode="sft")`` with weights loaded.
            cpu_infer, moe_config: unused.
            lora_params: the six adapter tensors by name; gradients reach those that require them.
            hidden_size, num_experts_per_tok: H, K.

        Returns:
            A tensor with the shape, dtype and device of hidden_states.
        """
        moe_amx._check_loaded()
        weights, ids = router_logits.float().softmax(-1).topk(num_experts_per_tok)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = hidden_states.reshape(-1, hidden_size).to("cpu", torch.bfloat16)
        ids, weights = (tensor.reshape(len(rows), -1).cpu() for tensor in (ids, weights))
        factors = lora.arguments(lora_params, moe_amx.lora_scaling) if lora_params else {}
        return moe_amx._run(rows, ids, weights, **factors).to(hidden_states).reshape(hidden_states.shape)


class MOELayerWrapper(KTMoELayerWrapper):
    """A MoE block whose experts run through the op with adapters of their own.

    ``wrapper(hidden_states)`` returns what the block returns: its router chooses, its shared experts are
    added. ``lora_params`` has the six Parameters by name, and is part of ``wrapper.parameters()``. The later
    name of the class is KTMoELayerWrapper.

    Args:
        original_moe: the model's block.
        moe_amx: its experts, ``KTMoEWrapper(mode="sft")`` with weights loaded.
        cpu_infer: as ``init_cpu_infer`` returns it; may be None.
        lora_params: as ``create_lora_params`` returns them.
        moe_config, hidden_size, layer_idx: as ``get_moe_arch_config`` describes the block; H; its layer.
    """

    def __init__(
        self,
        original_moe: nn.Module,
        moe_amx: SFTWrapper,
        cpu_infer: CPUInfer | None,
        lora_params: Mapping[str, nn.Parameter] | None,
        moe_config: MOEArchConfig,
        hidden_size: int,
        layer_idx: int,
    ) -> None:
        super().__init__(original_moe, moe_amx, lora_params, moe_config, hidden_size, layer_idx)
        self.cpu_infer = cpu_infer

    @property
    def moe_amx(self) -> SFTWrapper:
        return self.backend


def init_cpu_infer(model_args: Any) -> CPUInfer:
    """Sets the number of threads, ``model_args.kt_num_threads``, and returns an object that carries it."""
    num_threads = kt_value(model_args, "kt_num_threads") or torch.get_num_threads()
    use_threads(num_threads)
    if kt_value(model_args, "kt_tp_enabled") is not False:
        return CPUInfer(num_threads)
    pools = WorkerPoolConfig()
    pools.subpool_count, pools.subpool_numa_map, pools.subpool_thread_count = 1, [0], [num_threads]
    return CPUInfer(pools)


def wrap_moe_layers_with_amx(
    model: nn.Module, model_args: Any, finetuning_args: Any, cpu_infer: CPUInfer | None = None
) -> list[MOELayerWrapper]:
    """Replaces a model's MoE blocks, in place, by blocks whose experts have adapters.

    Args:
        model: on the CPU; its experts become frozen.
        model_args: object with attributes kt_backend, kt_weight_path, kt_num_threads and so on.
        finetuning_args: object with attributes lora_rank and lora_alpha.
        cpu_infer: as ``init_cpu_infer`` returns it; may be None.

    Returns:
        The wrappers in the order of the layers, which are also ``model._kt_wrappers``. With a kt_backend that
        ends in _SkipLoRA, their ``lora_params`` is None.

    Raises:
        KTAMXModelNotSupportedError: the architecture is unknown; the message lists the known ones.
        KTAMXConfigError: a setting is wrong or not supported, or the model has been wrapped before.

    Example:
        >>> wrappers = wrap_moe_layers_with_amx(model, model_args, finetuning_args, cpu_infer)
        >>> optimizer = torch.optim.AdamW(get_kt_lora_params(model), lr=1e-4)
    """
    settings = settings_of(model_args)
    warn_without_amx(kt_value(model_args, "kt_backend"))
    rank, alpha = finetuning_args.lora_rank, finetuning_args.lora_alpha

    def make(
        block: nn.Module, backend: SFTWrapper, moe_config: MOEArchConfig, layer_idx: int
    ) -> MOELayerWrapper:
        sizes = backend.num_experts, backend.hidden_size, backend.moe_intermediate_size
        params = create_lora_params(*sizes, rank, alpha) if backend.trains_lora else None
        return MOELayerWrapper(block, backend, cpu_infer, params, moe_config, backend.hidden_size, layer_idx)

    return wrap_layers(model, settings, make, lora_rank=rank, lora_alpha=alpha)


def load_kt_model(config, model_args: Any, finetuning_args: Any) -> nn.Module:
    """Loads a causal language model in bfloat16 whose MoE blocks have adapters on their experts.

    Everything but the experts and their adapters moves to the GPU, if there is one.

    Args:
        config: the model's configuration.
        model_args: object with attributes model_name_or_path, kt_backend, kt_weight_path and so on.
        finetuning_args: object with attributes lora_rank and lora_alpha.

    Returns:
        The model. ``_kt_wrappers`` lists the wrappers, in the order of the layers.

    Raises:
        KTAMXModelNotSupportedError: the architecture is unknown; nothing is loaded.
        KTAMXConfigError: a setting is wrong or not supported.
    """
    cpu_infer = init_cpu_infer(model_args)
    loading = get_kt_loading_kwargs(
        config, model_args, trust_remote_code=kt_value(model_args, "trust_remote_code")
    )
    after = {key: kt_value(model_args, key) for key in ("kt_backend", "kt_num_threads")}

    def wrap(model: nn.Module) -> None:
        wrap_moe_layers_with_amx(model, after, finetuning_args, cpu_infer)

    return load_model(model_args.model_name_or_path, wrap, **loading)


def get_kt_lora_params(model: nn.Module) -> list[nn.Parameter]:
    """Returns the adapters of all wrapped layers, in order; an empty list for a model without them."""
    layers = (wrapper.lora_params for wrapper in wrappers_of(model))
    return [parameter for params in layers if params is not None for parameter in params.values()]


def update_kt_lora_pointers(model: nn.Module) -> None:
    """Calls ``update_lora_pointers`` of all wrapped layers.

    Raises:
        KTAMXConfigError: the model has no wrapped layers.
    """
    wrappers = wrappers_of(model)
    if not wrappers:
        raise KTAMXConfigError("update_kt_lora_pointers: the model has no wrapped MoE layers")
    for wrapper in wrappers:
        wrapper.update_lora_pointers()
