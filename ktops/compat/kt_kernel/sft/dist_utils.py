"""Gradient checkpointing of a wrapped model, and its processes."""

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

import ktops
from ktops.compat.kt_kernel.sft.arch import KTAMXConfigError

RETAINING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Experts whose activation policy is cpu: retain."""


def get_activation_checkpoint_context_fn() -> Callable[[], tuple[AbstractContextManager, ...]]:
    """Returns a ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

    With a kt_activation_policy of cpu: retain, recomputing a block does not run its experts again. It changes
    memory and time, never the result.

    Example:
        >>> context_fn = get_activation_checkpoint_context_fn()
        >>> checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
    """
    return _contexts


def _contexts() -> tuple[AbstractContextManager, ...]:
    return ktops.checkpoint_context_fn() if RETAINING else (nullcontext(), nullcontext())


def require_one_process() -> None:
    """Raises KTAMXConfigError if this is one of several processes that train a model."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
    else:
        count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise KTAMXConfigError(
            f"ktops takes kt_kernel's place in one process, got {count}: start it without torchrun, or use "
            "the unmodified transformers and PEFT with ktops.enable(), which also runs in several processes"
        )
