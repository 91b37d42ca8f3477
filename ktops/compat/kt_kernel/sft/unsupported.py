"""Names of kt_kernel.sft whose work ktops does elsewhere or not at all: each raises and says what to use."""

from collections.abc import Callable
from typing import NoReturn

from ktops.checkpoints.checkpoint import PACKED
from ktops.integrations.settings import REFUSED

LORA_EXPERTS = REFUSED["kt_use_lora_experts"]
PROFILE = "measure with ktops.profile(), a context manager"
OWN_WEIGHTS = "ktops.load_experts(model, path) loads experts in any format, as ktops.ExpertWeight"


class Unsupported:
    """A class of kt_kernel.sft that cannot be instantiated."""

    reason: str

    def __init__(self, *args, **kwargs) -> None:
        raise NotImplementedError(f"kt_kernel.sft.{type(self).__name__}: {self.reason}")


def _function(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args, **kwargs) -> NoReturn:
        raise NotImplementedError(f"kt_kernel.sft.{name}: {reason}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Raises NotImplementedError: {reason}."
    return refuse


class LoRAExpertMLP(Unsupported):
    reason = LORA_EXPERTS


class LoRAExperts(Unsupported):
    reason = LORA_EXPERTS


class KExpertsSFTBuffer(Unsupported):
    reason = "ktops has no buffers that layers share"


class INT8ExpertWeights(Unsupported):
    reason = OWN_WEIGHTS


class BlockFP8ExpertWeights(Unsupported):
    reason = OWN_WEIGHTS


class RAWINT4ExpertWeights(Unsupported):
    reason = OWN_WEIGHTS


save_lora_experts_to_adapter = _function("save_lora_experts_to_adapter", LORA_EXPERTS)
load_lora_experts_from_adapter = _function("load_lora_experts_from_adapter", LORA_EXPERTS)
load_experts_from_kt_weight_path = _function("load_experts_from_kt_weight_path", PACKED)
validate_persistent_int8_weights = _function("validate_persistent_int8_weights", PACKED)
load_block_fp8_experts_from_checkpoint_files = _function(
    "load_block_fp8_experts_from_checkpoint_files", OWN_WEIGHTS
)
load_rawint4_experts_from_checkpoint_files = _function(
    "load_rawint4_experts_from_checkpoint_files", OWN_WEIGHTS
)
collect_kt_sft_profile = _function("collect_kt_sft_profile", PROFILE)
format_kt_sft_profile = _function("format_kt_sft_profile", PROFILE)
reset_kt_sft_profile = _function("reset_kt_sft_profile", PROFILE)
