"""Modules that stay in CPU memory while the model around them moves to an accelerator."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

Convert = Callable[[Tensor], Tensor]
"""What ``nn.Module._apply`` calls with every tensor: ``.to()``, ``.half()`` and the like."""

ON_DEVICE = "on_device"
"""The child of an experts module that holds copies of some experts, a DeviceExperts."""

MOVES = ("post_expert_norm", ON_DEVICE)
"""The children of an experts module that go to the device."""


def staying(convert: Convert) -> Convert:
    """Returns a function that changes dtypes as ``convert`` does, but moves nothing to an accelerator."""

    def convert_in_place(tensor: Tensor) -> Tensor:
        target = convert(tensor.new_empty(0))
        return convert(tensor) if target.device.type in ("cpu", "meta") else tensor.to(target.dtype)

    return convert_in_place


class StaysOnCPU(nn.Module):
    """A module that ``.to(device)`` leaves in CPU memory; it follows changes of dtype."""

    def _apply(self, fn: Convert, recurse: bool = True):
        return super()._apply(staying(fn), recurse)


def keep_in_host_memory(module: nn.Module) -> None:
    """Makes ``.to(device)``, of a module or of a model around it, leave its tensors in CPU memory.

    Changes of dtype still apply. Children named in ``MOVES`` still move. Copies of the module stay, too.

    Example:
        >>> keep_in_host_memory(model.model.layers[0].mlp.experts)
        >>> model.to("cuda").model.layers[0].mlp.experts.down_proj.device
        device(type='cpu')
    """
    module.__dict__["_apply"] = partial(_apply, module)


def is_kept(module: nn.Module) -> bool:
    """True if :func:`keep_in_host_memory` was called with the module, or with one that it is a copy of."""
    return "_apply" in module.__dict__


def _apply(module: nn.Module, fn: Convert, recurse: bool = True) -> nn.Module:
    for name in MOVES if recurse else ():
        child = module._modules.get(name)
        if child is not None:
            child._apply(fn)
    return type(module)._apply(module, staying(fn), recurse)
