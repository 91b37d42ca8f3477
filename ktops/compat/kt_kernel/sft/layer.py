"""The names of KTransformers' module ``kt_kernel.sft.layer``."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from ktops.compat.kt_kernel.sft.arch import MOEArchConfig
from ktops.compat.kt_kernel.sft.config import KTConfig
from ktops.compat.kt_kernel.sft.unsupported import LORA_EXPERTS
from ktops.compat.layer import MoELayer
from ktops.compat.sft import SFTWrapper


class KTMoELayerWrapper(MoELayer):
    """A MoE block whose experts run through the op; see :class:`ktops.compat.layer.MoELayer`.

    Args:
        original_moe: the model's block.
        wrapper: its experts, as ``KTMoEWrapper(mode="sft")`` holds them after loading.
        lora_params: six Parameters by name; None takes the wrapper's adapters, if it has them.
        moe_config, hidden_size, layer_idx: as ``get_moe_arch_config`` describes the block; H; its layer.
        lora_experts: must be None.
        full_weight_grad: must be False or None.
        uses_authoritative_optimizer_grads, activation_policy: unused; they select kt-kernel's buffers.
    """

    config: KTConfig
    """What wrap_moe_layers_with_kt_wrapper was called with."""

    is_adapted: bool = False
    """Whether kt_adapt_peft_lora has been called."""

    def __init__(
        self,
        original_moe: nn.Module,
        wrapper: SFTWrapper,
        lora_params: Mapping[str, nn.Parameter] | None,
        moe_config: MOEArchConfig,
        hidden_size: int,
        layer_idx: int,
        lora_experts: None = None,
        full_weight_grad: bool | None = None,
        uses_authoritative_optimizer_grads: bool | None = None,
        activation_policy: object = None,
    ) -> None:
        if lora_experts is not None:
            raise NotImplementedError(f"KTMoELayerWrapper: lora_experts must be None: {LORA_EXPERTS}")
        if full_weight_grad:
            raise NotImplementedError(
                "KTMoELayerWrapper: full_weight_grad must be False: ktops.swap_experts(model) trains the "
                "experts themselves"
            )
        super().__init__(original_moe, wrapper, lora_params, moe_config, hidden_size, layer_idx)

    def set_rank(self, rank: int, alpha: float) -> None:
        """Sets the rank and the alpha of adapters, before there are any."""
        self.config = dataclasses.replace(self.config, kt_lora_rank=rank, kt_lora_alpha=alpha)
        self.backend.lora_rank, self.backend.lora_alpha = rank, alpha
        self.backend.lora_scaling = alpha / rank

    @property
    def wrapper(self) -> SFTWrapper:
        return self.backend
