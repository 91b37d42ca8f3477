"""``kt::moe_fwd`` for tokens on a CUDA device, in the order of its streams, while Python goes on.

``begin`` enqueues copies of the tokens and routes to pinned memory and the start of the computation,
``result`` the wait for it and the copy of the output to the device. Neither waits. A CUDA graph that captures
both computes the experts at each launch.
"""

import atexit
import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ktops._modes import call_without_modes
from ktops._warn import warn_once
from ktops.ops.arguments import MoeArguments
from ktops.ops.check_devices import TOKENS
from ktops.ops.memory import register_pinned
from ktops.ops.moe_fwd import empty_output


class Streams(Protocol):
    """The streams of a type of device, as PyTorch knows them."""

    def current(self, device: torch.device) -> Any:
        """Returns the current stream of a device."""

    def address(self, stream: Any) -> int:
        """Returns the stream's handle in the CUDA runtime."""

    def at(self, address: int, device: torch.device) -> Any:
        """Returns the stream of a device with this handle."""

    def capturing(self) -> bool:
        """Returns whether the current stream is captured."""

    def use(self, stream: Any) -> AbstractContextManager:
        """Makes a stream and its device the current ones."""

    def wait(self, stream: Any, tensor: Tensor) -> None:
        """Has the current stream of the tensor's device wait for what ``stream`` was given until now."""


class CudaStreams:
    """The streams of ``torch.cuda``."""

    def current(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def address(self, stream: torch.cuda.Stream) -> int:
        return stream.cuda_stream

    def at(self, address: int, device: torch.device) -> torch.cuda.Stream:
        if not address:
            return torch.cuda.default_stream(device)
        return torch.cuda.ExternalStream(address, device=device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        return nullcontext() if stream == torch.cuda.current_stream() else torch.cuda.stream(stream)

    def wait(self, stream: torch.cuda.Stream, tensor: Tensor) -> None:
        current = torch.cuda.current_stream(tensor.device)
        if current != stream:
            current.wait_stream(stream)
            tensor.record_stream(current)


STREAMS: dict[str, Streams] = {"cuda": CudaStreams()}
"""device type -> its streams."""

register_pinned(torch.ops.kt.staged_bytes, torch.ops.kt.empty_stream_cache)


def captured(device: torch.device) -> bool:
    """Returns whether a CUDA graph captures the current stream of the device."""
    known = STREAMS.get(device.type)
    return known is not None and known.capturing()


_loading = threading.Lock()


@functools.lru_cache(maxsize=1)
def load(library: str = "") -> None:
    """Starts to use the CUDA runtime in this process, or, for tests, another library with its functions.

    Raises:
        RuntimeError: there is none, or it lacks a function.
    """
    torch.ops.kt.load_cuda(library)
    atexit.unregister(torch.ops.kt.stop_streams)
    atexit.register(torch.ops.kt.stop_streams)


@functools.cache
def available(device_type: str) -> bool:
    """Returns whether calls for tokens on such a device can be enqueued.

    If not, and it is CUDA, warns and gives the reason.

    Example:
        >>> if available(hidden_states.device.type):
        ...     pending = begin(arguments)
    """
    if device_type != "cuda":
        return False
    try:
        with _loading:
            load()
    except RuntimeError as error:
        warn_once(f"ktops: Python waits for the experts, which cannot be computed in stream order: {error}")
        return False
    return True


class Pending:
    """A call that has begun. If it is dropped, its result is not copied to the device."""

    def __init__(self, call: int, streams: Streams, stream: Any, arguments: MoeArguments) -> None:
        self._call: int | None = call
        self._streams = streams
        self._stream = stream
        self._lock = threading.Lock()
        self.captured = streams.capturing()
        """Whether the call is part of a capture."""
        self.output = empty_output(arguments)
        """The tensor that :meth:`result` fills."""

    def result(self) -> Tensor:
        """Returns the output, [T, H] or [T, K, H], for use on the current stream of its device.

        Raises:
            RuntimeError: an earlier call failed on the CPU, or only one of begin and this is in a capture.
        """
        with self._lock:
            if self._call is not None:
                with self._streams.use(self._stream), torch._C._AutoDispatchBelowAutograd():
                    torch.ops.kt.moe_fwd_end(self._call, self.output)
                self._call = None
        self._streams.wait(self._stream, self.output)
        return self.output

    def __del__(self) -> None:
        if self._call is not None:
            call_without_modes(torch.ops.kt.moe_fwd_end.default, self._call, None)


def begin(arguments: MoeArguments) -> Pending:
    """Enqueues ``kt::moe_fwd`` on the current stream of the device of hidden_states.

    Args:
        arguments: those of ``kt::moe_fwd``: hidden_states, topk_ids and topk_weights on the device, the
            others in CPU memory.

    Returns:
        The call; its :meth:`Pending.result` enqueues the copy of the output to the device.

    Raises:
        RuntimeError: as for ``kt::moe_fwd``, before anything is enqueued, or an earlier call failed.

    Example:
        >>> pending = begin(arguments)
        >>> shared = shared_experts(hidden_states)
        >>> output = pending.result() + shared
    """
    device = arguments.hidden_states.device
    streams = STREAMS[device.type]
    stream = streams.current(device)
    with streams.use(stream), torch._C._AutoDispatchBelowAutograd():
        tokens = (getattr(arguments, name).contiguous() for name in TOKENS)
        call = torch.ops.kt.moe_fwd_begin(*tokens, *arguments[len(TOKENS) :], streams.address(stream))
        return Pending(call, streams, stream, arguments)


def synchronize() -> None:
    """Waits for all calls.

    Raises:
        RuntimeError: one of them failed on the CPU; its output is NaN.

    Example:
        >>> with torch.no_grad():
        ...     output = experts(hidden_states, ids, weights)
        ...     ktops.devices.streams.synchronize()  # the call has read the weights
        ...     experts.down_proj.mul_(0.5)
    """
    torch.ops.kt.synchronize_streams()
