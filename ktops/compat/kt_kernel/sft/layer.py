"""The names of KTransformers' module ``kt_kernel.sft.layer``."""

from collections.abc import Mapping

from torch import nn

from ktops.compat.kt_kernel.sft.arch import MOEArchConfig
from ktops.compat.kt_kernel.sft.config import KTConfig
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
            raise NotImplementedError(
                "KTMoELayerWrapper: lora_experts must be None: additional experts made of LoRA are not "
                "supported; adapters on the experts are"
            )
        if full_weight_grad:
            raise NotImplementedError(
                "KTMoELayerWrapper: full_weight_grad must be False: ktops.swap_experts(model) trains the "
                "experts themselves"
            )
        super().__init__(original_moe, wrapper, lora_params, moe_config, hidden_size, layer_idx)

    @property
    def wrapper(self) -> SFTWrapper:
        return self.backend
