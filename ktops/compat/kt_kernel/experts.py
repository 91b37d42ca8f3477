"""The names of KTransformers' module ``kt_kernel.experts``."""

from ktops.compat.experts import ExpertsWrapper as BaseMoEWrapper
from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["INFERENCE_METHODS", "SFT_METHODS", "BaseMoEWrapper", "KTMoEWrapper"]
