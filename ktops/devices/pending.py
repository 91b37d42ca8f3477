"""Tensors whose first use collects what the CPU computes for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ktops.devices.streams import Pending

_thread = threading.local()


@contextmanager
def may_be_pending() -> Iterator[None]:
    """Inside the context, ``kt::moe_fwd`` for tokens on a device may return a :class:`PendingTensor`.

    Example:
        >>> with may_be_pending():
        ...     output = moe_sft(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)
    """
    before = allowed()
    _thread.allowed = True
    try:
        yield
    finally:
        _thread.allowed = before


def allowed() -> bool:
    """Returns whether this thread is inside of :func:`may_be_pending`."""
    return getattr(_thread, "allowed", False)


class PendingTensor(Tensor):
    """The output of a call that has begun. It has a shape, a dtype and a device; its first use collects it.

    Views of it are pending as well. Any other operator gets, and returns, plain tensors. Every use is ordered
    after the call, on whichever stream.
    """

    _pending: Pending
    _view: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in torch's own

    @staticmethod
    def __new__(cls, pending: Pending, view: Tensor | None = None) -> "PendingTensor":
        view = pending.output if view is None else view
        self = Tensor._make_wrapper_subclass(
            cls,
            view.shape,
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=view.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(self)  # for code that circumvents the dispatcher
        self._pending, self._view = pending, view
        return self

    def collect(self) -> Tensor:
        """Returns the plain tensor, for use on the current stream of its device."""
        self._pending.result()
        return self._view

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = args[0] if args else None
        if isinstance(first, PendingTensor) and _is_view(func):
            views = func(first._view, *args[1:], **(kwargs or {}))
            return tree_map_only(Tensor, lambda view: PendingTensor(first._pending, view), views)
        args, kwargs = tree_map_only(PendingTensor, PendingTensor.collect, (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_view(func: torch._ops.OpOverload) -> bool:
    """Returns whether an operator returns views of its first argument and changes nothing."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write
