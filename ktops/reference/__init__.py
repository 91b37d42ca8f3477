"""The specification of the operators in plain PyTorch, step by step, in any floating dtype up to float64."""

from ktops.reference.moe_sft import moe_fwd, moe_sft_bwd, moe_sft_fwd

__all__ = ["moe_fwd", "moe_sft_bwd", "moe_sft_fwd"]
