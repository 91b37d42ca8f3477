"""Measures the current limits of this machine (peak, read bandwidth) and the load of other processes."""

import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.roofline import Limits

_CALL_SECONDS = 0.02  # one measurement of the peak; far above the skew between starting threads
_REPEATS = 3
_MIN_BUFFER_BYTES = 256 << 20
_CACHED_BYTES = 512 << 10  # larger than the first-level cache, smaller than the second
_CACHE_READS = 20


def _cpuinfo() -> dict[str, str]:
    """Returns what the kernel reports of the first CPU."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def cpu_model() -> str:
    """Returns the name of the processor, as the kernel reports it.

    If a hypervisor hides the model of an AMD processor, the family is added ("AMD EPYC family 26"), which
    tells a Zen 5 from a Zen 4 or older.
    """
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or "unknown"
    if fields.get("vendor_id") != "AuthenticAMD" or any(map(str.isdigit, name)):
        return name
    return f"{name} family {fields['cpu family']}"


def cpu_features() -> list[str]:
    """Returns the kernel's names of the vector and tile instructions that the processor supports."""
    wanted = ("fma", "avx", "f16c", "amx")
    return sorted(flag for flag in _cpuinfo().get("flags", "").split() if flag.startswith(wanted))


def last_level_cache_bytes() -> int:
    """Returns the size of the largest cache of CPU 0 in bytes; 0 if the kernel does not report it."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[-1]])
    return max(sizes)


def _busy_seconds() -> float:
    """Returns the CPU seconds used since boot by everything, including other guests of the hypervisor."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """Measures how many cores other processes use during a ``with`` block; the result is in ``cores``.

    The kernel counts in ticks of 10 ms, so the result for blocks under 0.2 s is inaccurate.

    Example:
        >>> with OtherLoad() as load:
        ...     work()
        >>> load.cores < 0.15
        True
    """

    cores: float = 0.0

    def __enter__(self) -> "OtherLoad":
        self._start = (time.perf_counter(), _busy_seconds(), time.process_time())
        self._left_out = 0.0
        return self

    def leave_out(self, cpu_seconds: float) -> None:
        """Counts CPU time of other processes within the block as part of the measurement."""
        self._left_out += cpu_seconds

    def __exit__(self, *_) -> None:
        wall, busy, own = self._start
        wall = time.perf_counter() - wall
        others = (_busy_seconds() - busy) - (time.process_time() - own) - self._left_out
        self.cores = max(0.0, others / wall)


def run_on_threads(num_threads: int, function: Callable[[int], object]) -> list:
    """Calls ``function(index)`` in num_threads Python threads that start together; returns the results.

    The calls overlap while the function releases the interpreter lock, as every PyTorch operator does.

    Raises:
        Exception: the first one that a thread raised.
    """
    barrier = threading.Barrier(num_threads)
    results: list = [None] * num_threads
    errors: list[Exception] = []

    def body(index: int) -> None:
        barrier.wait()
        try:
            results[index] = function(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Calibration:
    """Measures :class:`Limits` repeatedly with the same buffer and iteration counts.

    Args:
        num_threads: the number of threads that compute and read at once.
        buffer_bytes: the size of the buffer read to measure the bandwidth; default: four times the last-level
            cache, at least 256 MiB.
    """

    def __init__(self, num_threads: int, buffer_bytes: int | None = None) -> None:
        self.num_threads = num_threads
        size = buffer_bytes or max(_MIN_BUFFER_BYTES, 4 * last_level_cache_bytes())
        self._buffer = torch.ones(size // 8, dtype=torch.int64)
        self._cached = torch.ones(num_threads, _CACHED_BYTES // 8, dtype=torch.int64)
        self.fastest_cache_read = 0.0
        self._iterations: dict[tuple[str, str, bool], int] = {}

    def peak(self, isa: str, dtype: str, num_threads: int | None = None, *, from_l2: bool = False) -> float:
        """Returns the FLOP/s of num_threads threads that only issue multiply-adds; the best of three.

        With from_l2, they multiply matrices in their second-level caches, as the kernels of a layer do.
        """
        product = (isa, dtype, from_l2)
        if product not in self._iterations:
            self._iterations[product] = self._find_iterations(*product)
        iterations = self._iterations[product]

        def measure(_: int) -> float:
            return torch.ops.kt.measure_peak(isa, dtype, iterations, from_l2)

        return max(sum(run_on_threads(num_threads or self.num_threads, measure)) for _ in range(_REPEATS))

    def bandwidth(self, num_threads: int | None = None) -> float:
        """Returns the bytes/s that num_threads threads read from a large buffer; the best of three."""
        parts = self._buffer.tensor_split(num_threads or self.num_threads)

        def read(index: int) -> tuple[float, float]:
            start = time.perf_counter()
            torch.ops.kt.sum_words(parts[index])
            return start, time.perf_counter()

        seconds = []
        for _ in range(_REPEATS):
            starts, ends = zip(*run_on_threads(len(parts), read), strict=True)
            seconds.append(max(ends) - min(starts))
        return self._buffer.nbytes / min(seconds)

    def cache_read(self) -> float:
        """Returns the bytes per CPU second that the slowest thread reads from its core's second-level cache.

        Work on the other hyper-thread of a core, e.g. in another virtual machine, slows down these reads and
        every kernel that reads operands. It hardly affects the peak, and /proc/stat does not count it.
        ``fastest_cache_read`` is the largest value so far.
        """

        def read(index: int) -> float:
            start = time.thread_time()
            for _ in range(_CACHE_READS):
                torch.ops.kt.sum_words(self._cached[index])
            return _CACHE_READS * _CACHED_BYTES / (time.thread_time() - start)

        rate = min(run_on_threads(self.num_threads, read))
        self.fastest_cache_read = max(self.fastest_cache_read, rate)
        return rate

    def limits(self, isa: str, dtype: str) -> Limits:
        """Measures peak and bandwidth of all threads. Products of float16 are computed in float32."""
        return Limits(self.peak(isa, "float32" if dtype == "float16" else dtype), self.bandwidth())

    def _find_iterations(self, isa: str, dtype: str, from_l2: bool) -> int:
        iterations = 1 if from_l2 else 1024
        while iterations < 1 << 40:
            start = time.thread_time()  # not elapsed time: an interrupted call would seem long enough
            torch.ops.kt.measure_peak(isa, dtype, iterations, from_l2)
            if time.thread_time() - start >= _CALL_SECONDS:
                break
            iterations *= 2
        return iterations
