"""PyTorch's operators on streams of CUDA that need no GPU."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ktops.testing.fake_cuda import FakeCuda

_GARBAGE = 0xA5
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

aten = torch.ops.aten
_WAIT = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
_WITHOUT_VALUES = {aten.new_empty.default, aten.empty_like.default}


class OperatorsInOrder(TorchDispatchMode):
    """Inside the context, the current stream executes operators on tensors that :meth:`tensor` returned.

    Likewise those on their results, and copies with ``non_blocking``. Results hold garbage until the stream
    gets there. What is enqueued in a capture is executed at each launch. Operators that wait for a value and
    those that mix these tensors with others are errors.

    Example:
        >>> with fake_cuda.installed() as cuda, OperatorsInOrder(cuda) as device, cuda.use(stream):
        ...     y = 2 * device.tensor(torch.ones(3))
        ...     cuda.synchronize(stream)
    """

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self._storages: set[int] = set()
        self._kept: list[Any] = []
        self.errors: list[BaseException] = []
        """What operators raised on streams."""

    def tensor(self, host: Tensor) -> Tensor:
        """Returns a copy on the device, complete at once."""
        return self._own(host.clone())

    def read(self, tensor: Tensor) -> Tensor:
        """Returns a copy in CPU memory of what a tensor holds now."""
        with torch._C._DisableTorchDispatch():
            return tensor.clone()

    def _own(self, tensor: Tensor) -> Tensor:
        self._storages.add(tensor.untyped_storage().data_ptr())
        self._kept.append(tensor)
        return tensor

    def _is_own(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        is_transfer = kwargs.get("non_blocking", False)
        if func.namespace == "kt" or not (is_transfer or any(map(self._is_own, tensors))):
            return func(*args, **kwargs)
        if func in _WAIT:
            raise RuntimeError(f"{func} waits for a value on the device")
        if not is_transfer and not all(self._is_own(tensor) for tensor in tensors if tensor.dim()):
            raise RuntimeError(f"{func}: expected all tensors on the device")
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return func(*args, **kwargs)
        if any(alias is not None for alias in aliases):
            self._enqueue(lambda: func(*args, **kwargs))
            return args[0]
        results = tree_map_only(Tensor, self._garbage, _of_zeros(func, args, kwargs))

        def execute() -> None:
            computed = func(*args, **kwargs)
            for result, value in zip(tree_leaves(results), tree_leaves(computed), strict=True):
                result.copy_(value)

        if func not in _WITHOUT_VALUES:
            self._enqueue(execute)
        return results

    def _garbage(self, like: Tensor) -> Tensor:
        tensor = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device="cpu")
        ctypes.memset(tensor.data_ptr(), _GARBAGE, tensor.untyped_storage().nbytes())
        return self._own(tensor)

    def _enqueue(self, execute: Callable[[], object]) -> None:
        def call(_: object) -> None:
            try:
                execute()
            except Exception as error:
                self.errors.append(error)

        function = _HOST_FUNCTION(call)
        self._kept.append(function)
        stream = self._cuda.pointer(self._cuda.current(torch.device("cpu")))
        self._cuda.call("cudaLaunchHostFunc", stream, function, None)


def _of_zeros(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    """Returns what an operator returns for zeros in place of values that are not known yet."""

    def zeros(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu").zero_()

    args, kwargs = tree_map_only(Tensor, zeros, (args, kwargs))
    return func(*args, **kwargs)
