"""The device that the checks run on. Tests have others, which need no GPU, in place of Cuda."""

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ktops
from ktops.devices.pending import moe_sft_pending

SLEEP_CYCLES = 200_000_000
"""About 0.1 s of a GPU."""

FEWEST_ROUNDS, ROUNDS = 3, 9
LONG = 1.0
"""Seconds after which a median is taken of fewer rounds."""


class Sizes(NamedTuple):
    """The layer whose times are measured, and the numbers of tokens."""

    layer: dict[str, int]
    tokens: tuple[int, ...]
    many_tokens: tuple[int, ...]
    copied_bytes: int


FULL = Sizes(
    {"H": 2048, "I": 768, "E": 128, "K": 8}, (1, 128, 4096), (256, 512, 1024, 2048, 4096, 8192), 1 << 28
)
"""A layer of Qwen3-30B-A3B."""


class Captured(Protocol):
    """A CUDA graph and the tensor that each launch fills."""

    output: Tensor

    def launch(self) -> None:
        """Enqueues it on the current stream."""

    def destroy(self) -> None:
        """Releases the graph. The output stays."""


class Runtime(Protocol):
    """A device, and what the checks ask of it.

    Attributes:
        features: "tensors", if operators run on the device; "streams", if the experts are computed in the
            order of a stream; "traffic", if copies can be counted.
    """

    name: str
    device: torch.device
    features: frozenset[str]
    sizes: Sizes

    def synchronize(self) -> None:
        """Waits for everything that was enqueued."""

    def seconds(self, function: Callable[[], Any]) -> float:
        """Returns the time of a call, including what it enqueues, the median of several."""

    def traffic(self) -> AbstractContextManager[Counter[str]]:
        """Counts "down" and "up", bytes from and to the device, and "copies_down" and "copies_up"."""

    def pinned(self, nbytes: int) -> Tensor:
        """Returns bytes in host memory that copies overlap with."""

    def moe_sft(self, **arguments) -> Tensor:
        """Returns ktops.moe_sft for tokens on the device."""

    def begin(self, **arguments) -> Tensor:
        """Returns the same without gradients, as the experts of a model do: its first use collects it."""

    def stream(self) -> Any:
        """Returns a new stream."""

    def address(self, stream: Any) -> int:
        """Returns the handle of a stream."""

    def use(self, stream: Any) -> AbstractContextManager:
        """Makes a stream the current one."""

    def busy(self) -> AbstractContextManager[Callable[[], bool]]:
        """Keeps the current stream busy for a while; yields whether it still is."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueues a copy on the device."""

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        """Captures what a function enqueues on the current stream."""

    def compile(self, function: Callable) -> Callable:
        """Returns torch.compile(fullgraph=True) of it, with CUDA graphs where they are possible."""

    def reset(self) -> None:
        """Ends the use of memory by earlier checks."""


class CudaGraph:
    """Implements Captured."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self.output = function()

    def launch(self) -> None:
        self._graph.replay()

    def destroy(self) -> None:
        torch.cuda.synchronize()
        self._graph.reset()


class Cuda:
    """A GPU. Implements Runtime."""

    features = frozenset({"tensors", "streams", "traffic"})
    sizes = FULL

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.device = torch.device("cuda", 0)
        properties = torch.cuda.get_device_properties(self.device)
        self.name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any]) -> float:
        times: list[float] = []
        function()
        while len(times) < FEWEST_ROUNDS or (len(times) < ROUNDS and sum(times) < LONG):
            self.synchronize()
            begin = self._clock()
            function()
            self.synchronize()
            times.append(self._clock() - begin)
        return statistics.median(times)

    @contextmanager
    def traffic(self) -> Iterator[Counter[str]]:
        counted: Counter[str] = Counter()
        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            torch.zeros(1, device=self.device).cpu()  # what must be seen
            yield counted
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            counted.update(count_copies(json.loads(path.read_text())["traceEvents"]))
        if not counted["copies_down"]:
            raise RuntimeError("torch.profiler recorded no copies: CUPTI may not trace this process")
        counted.subtract({"down": 4, "copies_down": 1, "pageable_down": 1})

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def moe_sft(self, **arguments) -> Tensor:
        return ktops.moe_sft(**arguments)

    def begin(self, **arguments) -> Tensor:
        return moe_sft_pending(**arguments)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def address(self, stream: torch.cuda.Stream) -> int:
        return stream.cuda_stream

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    @contextmanager
    def busy(self) -> Iterator[Callable[[], bool]]:
        stream = torch.cuda.current_stream(self.device)
        torch.cuda._sleep(SLEEP_CYCLES)
        try:
            yield lambda: not stream.query()
        finally:
            stream.synchronize()

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def capture(self, function: Callable[[], Tensor]) -> CudaGraph:
        return CudaGraph(function)

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, mode="reduce-overhead")

    def reset(self) -> None:
        self.synchronize()
        torch.compiler.reset()
        ktops.empty_cache()
        torch.cuda.empty_cache()


def count_copies(events: list[dict]) -> Counter[str]:
    """Counts copies between host and device in a trace of torch.profiler.

    Returns:
        As :meth:`Runtime.traffic`; and "pageable_down" and "pageable_up", the copies that pinned memory had
        no part in.
    """
    counted: Counter[str] = Counter()
    for event in events:
        for direction, kind in (("down", "DtoH"), ("up", "HtoD")):
            if event.get("cat") == "gpu_memcpy" and f" {kind} " in event["name"]:
                counted[direction] += event["args"]["bytes"]
                counted[f"copies_{direction}"] += 1
                counted[f"pageable_{direction}"] += "Pageable" in event["name"]
    return counted
