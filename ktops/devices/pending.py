"""Tensors whose first use collects what the CPU computes for them."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from ktops.devices.streams import Pending
from ktops.ops.moe_sft import moe_sft

_thread = threading.local()


def moe_sft_pending(*args, **options) -> Tensor:
    """Returns ``ktops.moe_sft`` of the arguments, where possible as a :class:`PendingTensor`.

    It is possible without gradients, for tokens on a device whose calls can be enqueued, outside of
    ``torch.compile``.

    Example:
        >>> routed = moe_sft_pending(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)
        >>> routed + shared_experts(hidden_states)  # computed at the same time
    """
    if torch.compiler.is_compiling():
        return moe_sft(*args, **options)
    _thread.allowed = True
    try:
        return moe_sft(*args, **options)
    finally:
        _thread.allowed = False


def output(call: Pending) -> Tensor:
    """Returns the output of a call, pending if :func:`moe_sft_pending` asked for it, or else collected.

    In a capture it is collected at once, because it could not be collected after the end.
    """
    if getattr(_thread, "allowed", False) and not call.captured:
        return PendingTensor(call, call.output)
    return call.result()


class PendingTensor(Tensor):
    """The output of a call that has begun. It has a shape, a dtype and a device; its first use collects it.

    Views of it are pending as well. Any other operator gets, and returns, plain tensors. Every use is ordered
    after the call, on whichever stream.
    """

    _call: Pending | None  # None: nothing to collect
    _data: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in torch's own

    @staticmethod
    def __new__(cls, call: Pending | None, data: Tensor) -> "PendingTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=data.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(self)  # for code that circumvents the dispatcher
        self._call, self._data = call, data
        return self

    @property
    def collected(self) -> Tensor:
        """The plain tensor, for use on the current stream of its device."""
        if self._call is not None:
            self._call.result()
        return self._data

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        torch.ops.aten.set_(self, other)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_view(func):
            source, *rest = args
            views = func(source._data, *rest, **kwargs)
            if isinstance(views, Tensor):
                return PendingTensor(source._call, views)
            return tree_map_only(Tensor, lambda view: PendingTensor(source._call, view), views)
        result = func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        if torch.Tag.inplace_view in func.tags:
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result

    # torch.compile takes and returns plain tensors in its place.

    def __tensor_flatten__(self):
        return ["collected"], None

    @staticmethod
    def __tensor_unflatten__(inner_tensors, context, outer_size, outer_stride):
        return PendingTensor(None, inner_tensors["collected"])


def _plain(argument: Any) -> Any:
    """Returns an argument of an operator with plain tensors, also in lists, in place of pending ones."""
    if isinstance(argument, PendingTensor):
        return argument.collected
    if isinstance(argument, (list, tuple)):
        return tree_map_only(PendingTensor, _plain, argument)
    return argument


@functools.cache
def _is_view(func: torch._ops.OpOverload) -> bool:
    """Returns whether an operator returns views of its first argument and changes nothing."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write


def _of_collected(name: str) -> Callable:
    method = getattr(Tensor, name)

    def call(self, *args, **kwargs):
        return method(self.collected, *args, **kwargs)

    return call


for _name in (
    "__repr__", "__format__", "__reduce_ex__", "__deepcopy__", "__dlpack__",
    "data_ptr", "numpy", "tolist",
):  # fmt: skip
    setattr(PendingTensor, _name, _of_collected(_name))
