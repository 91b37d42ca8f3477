"""A simulated accelerator, "simgpu", whose memory is the CPU's, for tests on machines without a GPU.

``register()`` makes it the accelerator of the process. Tensors on it are wrappers around CPU tensors. Copies
to and from it are counted, and operators refuse tensors of both devices, as they do with a GPU. It has no
streams: order and overlap need other tests.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_iter, tree_map

NAME = "simgpu"

_copies: list[tuple[str, int]] = []
_libraries: list[torch.library.Library] = []


def device() -> torch.device:
    """Returns the simulated device; :func:`register` must have been called."""
    return torch.device(NAME, 0)


def register() -> None:
    """Makes "simgpu" a device of this process; a second call does nothing. Other processes are unaffected."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # a moved Parameter stays the same object
    _device_constructors()  # keeps what it finds: torch.tensor itself
    torch.tensor, torch.as_tensor = map(_from_data, (torch.tensor, torch.as_tensor))
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("linear", _autocast_linear, "AutocastPrivateUse1")
    for overload in ("arange", "arange.start", "arange.start_step"):
        aten.impl(overload, _arange, "PrivateUse1")
    _libraries.extend((library, aten))


class Backend:
    """``torch.simgpu``, the functions that torch and others ask a device for."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index: object) -> nullcontext:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""

    def get_rng_state(self, index: object = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, index: object = 0) -> None:
        torch.set_rng_state(state)


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Counts copies inside the ``with`` block; the result is complete when the block ends.

    The keys are "down" and "up", bytes from and to the device, and "copies_down" and "copies_up".

    Example:
        >>> with traffic() as moved:
        ...     torch.ones(4).to("simgpu")
        >>> moved
        Counter({'up': 16, 'copies_up': 1})
    """
    moved: Counter[str] = Counter()
    begin = len(_copies)
    yield moved
    for direction, nbytes in _copies[begin:]:
        moved[direction] += nbytes
        moved[f"copies_{direction}"] += 1


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; ``data_on_host`` holds its values."""

    data_on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in torch's own

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "SimulatedTensor":
        data = _host(data)
        tensor = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=device(),
            requires_grad=requires_grad,
        )
        tensor.data_on_host = data
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_on_host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context, size, stride) -> "SimulatedTensor":
        return SimulatedTensor(inner["data_on_host"])

    def __coerce_same_metadata_as_tangent__(self, context, expected_type=None) -> Tensor:
        return self if expected_type in (None, SimulatedTensor) else self.data_on_host

    def storage(self) -> torch.TypedStorage:
        return self.data_on_host._typed_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]  # without the option for torch's own printing
        return f"{self.data_on_host!r} on {NAME}"


def _autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.get_autocast_dtype(NAME)
    with torch.autocast(NAME, enabled=False):
        return torch.nn.functional.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )


def _from_data(constructor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a constructor that makes tensors on the CPU and copies them; torch itself fails."""

    @functools.wraps(constructor)
    def construct(data: Any, *, device: Any = None, **options) -> Tensor:
        target = torch.empty(0).device if device is None else torch.device(device)
        if target.type != NAME:
            return constructor(data, device=device, **options)
        return constructor(tree_map(_host, data), device="cpu", **options).to(target)

    return construct


def _host(value: Any) -> Any:
    return value.data_on_host if isinstance(value, SimulatedTensor) else value


def _simulated(value: Any) -> Any:
    return SimulatedTensor(value) if isinstance(value, Tensor) else value


def _run(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    """Runs an operator with at least one argument, or its result, on the device."""
    if func in _OWN:
        return _OWN[func](*args, **kwargs)
    if func.namespace == "kt":
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        return func.redispatch(keys, *args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)
    _require_one_device(func, (args, kwargs))
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    if "device" in kwargs:
        options["device"] = "cpu"
    result = func(*tree_map(_host, args), **tree_map(_host, options))
    written = _written(func, args, kwargs)
    return tree_map(lambda value: next((x for x in written if _host(x) is value), _simulated(value)), result)


def _written(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """Returns the tensors that the operator writes to; it may return them, too."""
    names = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    return [x for name in names for x in tree_iter(given.get(name)) if isinstance(x, Tensor)]


def _require_one_device(func: torch._ops.OpOverload, given: Any) -> None:
    for tensor in tree_iter(given):
        if isinstance(tensor, Tensor) and tensor.device.type != NAME and tensor.dim():
            raise RuntimeError(
                f"{func.name()}: expected all tensors on {device()}, got one on {tensor.device}"
            )


def _to_copy(source: Tensor, *, device=None, pin_memory=None, **options) -> Tensor:
    result = torch.ops.aten._to_copy(_host(source), **options)
    target = source.device if device is None else torch.device(device)
    _count(source.device.type, target.type, result)
    return SimulatedTensor(result) if target.type == NAME else result


def _copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _count(source.device.type, target.device.type, source)
    _host(target).copy_(_host(source))
    return target


def _arange(*args, device: torch.device, **options) -> Tensor:
    """The operator, whose own kernel resizes an empty tensor, which the wrapper would not follow."""
    return SimulatedTensor(torch.arange(*args, device="cpu", **options))


def _histc(counted: Tensor, *args, **kwargs) -> Tensor:
    """The operator for integers, which only the CPU does not have."""
    return SimulatedTensor(torch.histc(_host(counted).float(), *args, **kwargs).to(counted.dtype))


def _count(source: str, target: str, data: Tensor) -> None:
    nbytes = data.numel() * data.itemsize
    if source != target and isinstance(nbytes, int):  # not while a graph with symbolic sizes is traced
        _copies.append(("up" if target == NAME else "down", nbytes))


_OWN: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.aten._to_copy.default: _to_copy,
    torch.ops.aten.copy_.default: _copy_into,
    torch.ops.aten.histc.default: _histc,
    torch.ops.aten._conj.default: lambda tensor: SimulatedTensor(_host(tensor).conj_physical()),
}
