"""Measures how fast weights are quantized.

    python -m bench.quantize [--isa ISA ...] [--threads N] [--format NAME ...]

Quantizes bfloat16 weights [E, 2048, 2048] to every format that can be written, in groups of 128 or as the
format has it, with every method. Prints millions of weights per second, for the fastest of several calls, and
the bytes read and written relative to what the same threads read from memory in that time. The time of a
call is its CPU time divided by the threads, because other processes may take the cores.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ktops
from bench.arguments import Parser
from bench.machine import run_on_threads
from bench.report import print_columns
from ktops.formats import get_format, names
from ktops.testing.compare import threads

SIZE = 2048
EXPERTS = {"rtn": 16, "mse": 1, "hqq": 1}
"""For rtn more weights than caches hold; searches take long enough with one expert."""

CALLS, WORDS = 5, 1 << 25
HEAD = ("ISA", "format", "group", "method", "million weights/s", "of memory bandwidth")


def variants(wanted: list[str]) -> Iterator[tuple[str, int, str]]:
    """Yields (format, group size, method)."""
    for name in wanted:
        known = get_format(name)
        if known.has_quantizer:
            group_size = 128 if known.has_group_size(128) else known.default_group_size
            yield from ((name, group_size, method) for method in known.methods)


def fastest(function: Callable[[], object], num_threads: int) -> float:
    """Returns the CPU seconds of a thread in the fastest of several calls."""
    best = float("inf")
    for _ in range(CALLS):
        start = time.process_time()
        function()
        best = min(best, (time.process_time() - start) / num_threads)
    return best


def read_rate(num_threads: int) -> float:
    """Returns the bytes/s that all threads read from memory."""
    words = torch.ones(WORDS, dtype=torch.int64)
    parts = words.tensor_split(num_threads)

    def read() -> None:
        run_on_threads(num_threads, lambda index: torch.ops.kt.sum_words(parts[index]))

    return words.nbytes / fastest(read, num_threads)


def measure(weight: Tensor, name: str, group_size: int, method: str, num_threads: int) -> tuple[float, float]:
    """Returns the weights/s, and the bytes/s that were read and written.

    Quantizes one expert at a time, as ktops.quantize does: its codes then take memory that is in use already.
    """

    def run() -> None:
        for expert in weight:
            torch.ops.kt.quantize(expert[None], name, group_size, method)

    seconds = fastest(run, num_threads)
    codes = torch.ops.kt.quantize(weight[:1], name, group_size, method)
    moved = weight.nbytes + len(weight) * sum(tensor.nbytes for tensor in codes if tensor is not None)
    return weight.numel() / seconds, moved / seconds


def main() -> int:
    parser = Parser("quantize", __doc__)
    parser.isa(several=True)
    parser.threads()
    writable = [name for name in names(written=True) if get_format(name).has_quantizer]
    parser.add_argument("--format", nargs="+", choices=writable, default=writable, metavar="NAME")
    options = parser.parse_args()
    dense = torch.randn(max(EXPERTS.values()), SIZE, SIZE, dtype=torch.bfloat16)
    bandwidth = read_rate(options.threads)
    lines: list[tuple[str, ...]] = []
    for isa in options.isa:
        for name, group_size, method in variants(options.format):
            with ktops.use_isa(isa), threads(options.threads):
                rate, moved = measure(dense[: EXPERTS[method]], name, group_size, method, options.threads)
            figures = f"{rate / 1e6:.0f}", f"{moved / bandwidth:.2f}"
            lines.append((isa, name, str(group_size or "-"), method, *figures))
    print(f"{options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    print_columns(HEAD, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
