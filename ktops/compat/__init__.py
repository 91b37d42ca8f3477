"""APIs compatible with other systems: ``KTMoEWrapper`` from KTransformers' kt-kernel."""

from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["INFERENCE_METHODS", "SFT_METHODS", "KTMoEWrapper"]
