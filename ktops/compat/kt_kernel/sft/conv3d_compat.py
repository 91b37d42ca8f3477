"""The names of KTransformers' module ``kt_kernel.sft.conv3d_compat``.

They work around a slow Conv3d of torch 2.9, which ktops does not run with.
"""

from torch import nn


def patch_vlm_conv3d(model: nn.Module) -> list[str]:
    """Returns the names of the layers that need a workaround: none with the torch that ktops needs."""
    return []


def is_vlm_conv3d_compatible(model: nn.Module) -> bool:
    """Returns whether every Conv3d of a model is fast: True with the torch that ktops needs."""
    return True
