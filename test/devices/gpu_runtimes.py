"""Devices that need no GPU, for the checks of run_on_gpu.py: each has some of the features of one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.runtime import Sizes
from torch import Tensor

import ktops
from ktops.devices import kernels, pending, streams
from ktops.testing import simulated_device
from ktops.testing.fake_cuda import FakeCuda, Graph, Stream
from ktops.testing.inputs import op_arguments

TINY = Sizes({"H": 64, "I": 32, "E": 4, "K": 2}, (1, 3), (1, 2), 4096)


class WithoutClock:
    """Every call takes a second, whatever it does."""

    sizes = TINY

    def seconds(self, function: Callable[[], Any]) -> float:
        function()
        self.synchronize()
        return 1.0

    def synchronize(self) -> None:
        raise NotImplementedError

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class Simulated(WithoutClock):
    """The simulated device. Implements gpu.runtime.Runtime without streams."""

    name = simulated_device.NAME
    features = frozenset({"tensors", "traffic"})

    def __init__(self) -> None:
        self.device = simulated_device.device()
        self.traffic = simulated_device.traffic
        self.moe_sft = ktops.moe_sft

    def synchronize(self) -> None:
        """Nothing is enqueued."""

    def reset(self) -> None:
        torch.compiler.reset()

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, backend="eager")


class InOrder(WithoutClock):
    """The streams of the fake CUDA runtime. Implements gpu.runtime.Runtime without operators on tensors."""

    name = "fake CUDA"
    device = torch.device("cpu")
    features = frozenset({"streams"})

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.stream = cuda.stream
        self.address = cuda.address
        self.copy = cuda.copy

    def synchronize(self) -> None:
        for stream in self.cuda.streams:
            self.cuda.synchronize(stream)

    def reset(self) -> None:
        self.synchronize()
        self.cuda.functions.fake_wait_for_destructors()
        ktops.empty_cache()

    def moe_sft(self, **arguments) -> Tensor:
        return kernels.moe_fwd(*op_arguments(arguments))

    def begin(self, **arguments) -> Tensor:
        call = streams.begin(op_arguments(arguments))
        return pending.PendingTensor(call, call.output)

    def use(self, stream: Stream) -> contextlib.AbstractContextManager:
        return self.cuda.use(stream)

    @contextlib.contextmanager
    def busy(self) -> Iterator[Callable[[], bool]]:
        stream = self.cuda.current(self.device)
        self.cuda.block(stream)
        try:
            yield lambda: True  # a call that waits would never return
        finally:
            self.cuda.unblock(stream)

    def capture(self, function: Callable[[], Tensor]) -> "CapturedByFake":
        return CapturedByFake(self.cuda, function)


class CapturedByFake:
    """Implements gpu.runtime.Captured."""

    def __init__(self, cuda: FakeCuda, function: Callable[[], Tensor]) -> None:
        self._cuda, stream = cuda, cuda.current(InOrder.device)
        with cuda.capture(stream) as graph:
            self.output = function()
        self._graph: Graph = graph

    def launch(self) -> None:
        self._graph.launch(self._cuda.current(InOrder.device))

    def destroy(self) -> None:
        self._graph.destroy()
