"""The names of other systems: ``KTMoEWrapper`` of KTransformers' kt-kernel."""

from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["INFERENCE_METHODS", "SFT_METHODS", "KTMoEWrapper"]
