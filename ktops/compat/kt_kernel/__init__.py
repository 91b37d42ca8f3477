"""The names of KTransformers' module ``kt_kernel``; :func:`ktops.compat.install` makes it importable."""

from ktops.compat.finder import VERSION as __version__
from ktops.compat.wrapper import KTMoEWrapper

__all__ = ["KTMoEWrapper", "__version__"]
