"""APIs compatible with other systems: ``KTMoEWrapper`` and other names of KTransformers' kt-kernel."""

from ktops.compat.finder import install, uninstall
from ktops.compat.methods import INFERENCE_METHODS, SFT_METHODS
from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["INFERENCE_METHODS", "SFT_METHODS", "KTMoEWrapper", "install", "uninstall"]
