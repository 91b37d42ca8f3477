"""The names of KTransformers' module ``kt_kernel.sft.base``."""

from ktops.compat.kt_kernel.sft.unsupported import KExpertsSFTBuffer
from ktops.compat.sft import SFTWrapper as BaseSFTMoEWrapper

__all__ = ["BaseSFTMoEWrapper", "KExpertsSFTBuffer"]
