"""The names of KTransformers' module ``kt_kernel.sft.profiler``."""

from ktops.compat.kt_kernel.sft.unsupported import (
    collect_kt_sft_profile,
    format_kt_sft_profile,
    reset_kt_sft_profile,
)

__all__ = ["collect_kt_sft_profile", "format_kt_sft_profile", "reset_kt_sft_profile"]
