"""Keeps DistributedDataParallel from sending quantized weights to every process."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ktops.formats import ExpertWeight
from ktops.integrations.replacements import Replacements
from ktops.nn.int8_linear import Int8Linear

_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a model by which DistributedDataParallel knows what to leave alone."""

_replaced = Replacements()


def enable() -> None:
    """Makes DistributedDataParallel leave weights in formats alone; a second call does nothing.

    They are buffers, which it would broadcast when it is created and before every forward: as many bytes as
    the experts have, written to pages that processes share. Called where such weights are put into a model.
    """
    if not _replaced:
        _replaced.install(DistributedDataParallel, __init__=_init)


def disable() -> None:
    """Restores DistributedDataParallel."""
    _replaced.restore()


def _init(parallel: DistributedDataParallel, module: nn.Module, *args, **kwargs) -> None:
    """``DistributedDataParallel.__init__``."""
    names = [
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        if isinstance(child, ExpertWeight | Int8Linear)
        for name in child._buffers
    ]
    if names:
        setattr(module, _IGNORED, [*getattr(module, _IGNORED, ()), *names])
    _replaced.original["__init__"](parallel, module, *args, **kwargs)
