"""The names of KTransformers' module ``kt_kernel.sft.weight_manifest``."""

from ktops.compat.kt_kernel.sft.unsupported import validate_persistent_int8_weights

__all__ = ["validate_persistent_int8_weights"]
