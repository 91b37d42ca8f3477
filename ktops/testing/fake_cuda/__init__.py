"""Streams of CUDA without a GPU, to test what ktops enqueues on them.

A library with the functions of the CUDA runtime, built with g++ on first use; ``fake_cuda.cpp`` explains what
it does. Tensors on the CPU take the place of those on the device.

Example:
    >>> with fake_cuda.installed() as cuda:
    ...     stream = cuda.stream()
    ...     with cuda.use(stream):
    ...         pending = streams.begin(arguments)
    ...         output = pending.result()
    ...     cuda.synchronize(stream)
"""

import atexit
import contextlib
import ctypes
import functools
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ktops.devices import streams
from ktops.testing.compiler import compile_cpp

_DEVICE_TO_DEVICE = 3
_CAPTURE_MODE_GLOBAL = 0


@functools.cache
def library(version: int = 13000, *flags: str) -> Path:
    """Returns the shared library, as of a version of CUDA, built on the first call and deleted at exit."""
    folder = tempfile.mkdtemp(prefix="ktops-fake-cuda-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    flags = ("-O0", "-fPIC", "-shared", "-pthread", f"-DFAKE_CUDA_VERSION={version}", *flags)
    return compile_cpp(sources, Path(folder) / "libfakecudart.so", *flags)


@dataclass(frozen=True)
class Stream:
    """A stream of a device; handle 0 is the device's default stream."""

    handle: int
    device: int = 0


class Graph:
    """What a stream has captured, and can execute again."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self._handles: list[tuple[str, ctypes.c_void_p]] = []

    def instantiate(self, captured: ctypes.c_void_p) -> None:
        executable = ctypes.c_void_p()
        self._cuda.call("cudaGraphInstantiate", ctypes.byref(executable), captured, ctypes.c_uint64(0))
        self._handles = [("cudaGraphDestroy", captured), ("cudaGraphExecDestroy", executable)]

    def launch(self, stream: Stream) -> None:
        _, executable = self._handles[1]
        self._cuda.call("cudaGraphLaunch", executable, self._cuda.pointer(stream))

    def destroy(self) -> None:
        for function, handle in self._handles:
            self._cuda.call(function, handle)
        self._handles = []


class _Kept(TorchDispatchMode):
    """Keeps new tensors, as the memory of a device outlives the enqueued work that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list = []

    def clear(self) -> None:
        self._tensors.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._tensors.append(func(*args, **(kwargs or {})))
        return self._tensors[-1]


class FakeCuda:
    """The functions of the library. Implements :class:`ktops.devices.streams.Streams`.

    Raises:
        RuntimeError: a function failed; with its name and status.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.fake_calls.restype = ctypes.c_int64
        self.functions.fake_pinned_bytes.restype = ctypes.c_int64
        self._thread = threading.local()
        self.streams: list[Stream] = []
        self.kept: Any = _Kept()
        self.operators_wait = False
        """Whether a tensor is complete before its use, since operators on the CPU know no streams."""

    def call(self, function: str, *arguments) -> None:
        status = getattr(self.functions, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} failed with status {status}")

    def stream(self, device: int = 0) -> Stream:
        """Returns a new stream."""
        handle = ctypes.c_void_p()
        with self._device(device):
            self.call("cudaStreamCreate", ctypes.byref(handle))
        assert handle.value is not None
        self.streams.append(Stream(handle.value, device))
        return self.streams[-1]

    @staticmethod
    def pointer(stream: Stream) -> ctypes.c_void_p:
        return ctypes.c_void_p(stream.handle)

    @contextlib.contextmanager
    def _device(self, device: int) -> Iterator[None]:
        before = ctypes.c_int()
        self.call("cudaGetDevice", ctypes.byref(before))
        self.call("cudaSetDevice", device)
        try:
            yield
        finally:
            self.call("cudaSetDevice", before)

    # ktops.devices.streams.Streams

    def current(self, device: torch.device) -> Stream:
        return getattr(self._thread, "stream", Stream(0))

    def address(self, stream: Stream) -> int:
        return stream.handle

    def at(self, address: int, device: torch.device) -> Stream:
        return Stream(address, device.index or 0)

    def capturing(self) -> bool:
        return bool(self.functions.fake_is_captured(self.pointer(self.current(torch.device("cpu")))))

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._thread, "stream", Stream(0))
        self._thread.stream = stream
        try:
            with self._device(stream.device), self.kept:
                yield
        finally:
            self._thread.stream = before

    def wait(self, stream: Stream, tensor: Tensor) -> None:
        current = self.current(tensor.device)
        if self.operators_wait:
            self.synchronize(stream)
        if current == stream:
            return
        event = ctypes.c_void_p()
        self.call("cudaEventCreate", ctypes.byref(event))
        self.call("cudaEventRecord", event, self.pointer(stream))
        self.call("cudaStreamWaitEvent", self.pointer(current), event, 0)

    # What tests do with streams

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueues a copy on the current stream, between tensors that the test keeps alive."""
        assert to.is_contiguous() and source.is_contiguous() and to.nbytes == source.nbytes
        data = ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source.data_ptr()), ctypes.c_size_t(to.nbytes)
        self.call("cudaMemcpyAsync", *data, _DEVICE_TO_DEVICE, self.pointer(self.current(to.device)))

    def synchronize(self, stream: Stream) -> None:
        with self._device(stream.device):
            self.call("cudaStreamSynchronize", self.pointer(stream))

    @contextlib.contextmanager
    def capture(self, stream: Stream) -> Iterator[Graph]:
        """Captures what is enqueued on the stream, which is the current one, inside the context."""
        graph, captured = Graph(self), ctypes.c_void_p()
        with self.use(stream):
            self.call("cudaStreamBeginCapture", self.pointer(stream), _CAPTURE_MODE_GLOBAL)
            try:
                yield graph
            finally:
                self.call("cudaStreamEndCapture", self.pointer(stream), ctypes.byref(captured))
        graph.instantiate(captured)

    def delays(self, seed: int, microseconds: int) -> None:
        """Delays every operation at random, by up to so many microseconds."""
        self.functions.fake_set_delays(seed, microseconds)

    def fail(self, function: str, status: int = 1) -> None:
        """Has the next call of a function fail."""
        self.functions.fake_fail(function.encode(), status)

    def calls(self, function: str) -> int:
        """Returns the number of calls of a function so far."""
        return self.functions.fake_calls(function.encode())

    def pinned_bytes(self) -> int:
        return self.functions.fake_pinned_bytes()

    def block(self, stream: Stream) -> None:
        """Blocks the stream at this point until :meth:`unblock`."""
        with self._device(stream.device):
            self.functions.fake_block(self.pointer(stream))

    def unblock(self, stream: Stream) -> None:
        with self._device(stream.device):
            self.functions.fake_unblock(self.pointer(stream))


@functools.cache
def _loaded(path: Path) -> FakeCuda:
    return FakeCuda(path)


def install(path: Path | None = None) -> FakeCuda:
    """Lets tensors on the CPU use the streams of a library, by default of :func:`library`."""
    cuda = _loaded(path or library())
    streams.load(str(cuda.path))
    streams.STREAMS["cpu"] = cuda
    return cuda


@contextlib.contextmanager
def installed(path: Path | None = None) -> Iterator[FakeCuda]:
    """Calls :func:`install` for the context, at whose end it waits for all calls."""
    cuda = install(path)
    try:
        yield cuda
    finally:
        for stream in cuda.streams:
            cuda.unblock(stream)
        torch.ops.kt.synchronize_streams()
        cuda.functions.fake_wait_for_destructors()
        torch.ops.kt.empty_stream_cache()
        del streams.STREAMS["cpu"]
        cuda.kept.clear()
        cuda.delays(0, 0)
