"""The names of KTransformers' module ``kt_kernel.experts_base``."""

from ktops.compat.experts import ExpertsWrapper as BaseMoEWrapper
from ktops.compat.masks import generate_gpu_experts_masks

__all__ = ["BaseMoEWrapper", "generate_gpu_experts_masks"]
