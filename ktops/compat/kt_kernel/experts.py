"""The names of KTransformers' module ``kt_kernel.experts``."""

from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["KTMoEWrapper"]
