"""Measures how fast weights are quantized.

    python -m bench.quantize [--isa ISA ...] [--threads N] [--format NAME ...]

Quantizes bfloat16 weights [E, 2048, 2048] to every format that can be written, in groups of 128 or as the
format has it, with every method. Prints millions of weights per second, the fastest of several calls, and
the bytes read and written relative to what the same threads read from memory in that time.
"""

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import ktops
from bench.arguments import Parser
from bench.machine import Calibration
from bench.report import print_columns
from ktops.formats import get_format, names
from ktops.testing.compare import threads

SIZE = 2048
EXPERTS = {"rtn": 16, "mse": 1, "hqq": 1}
"""For rtn more weights than caches hold; searches take long enough with one expert."""

CALLS = 5
HEAD = ("ISA", "format", "group", "method", "million weights/s", "of memory bandwidth")


def variants(wanted: list[str]) -> Iterator[tuple[str, int, str]]:
    """Yields (format, group size, method)."""
    for name in wanted:
        known = get_format(name)
        if known.has_quantizer:
            group_size = 128 if known.has_group_size(128) else known.default_group_size
            yield from ((name, group_size, method) for method in known.methods)


def fastest_call(weight: Tensor, name: str, group_size: int, method: str) -> tuple[float, int]:
    """Returns the seconds of the fastest call and the bytes that it read and wrote."""
    best, moved = float("inf"), 0
    for _ in range(CALLS):
        start = time.perf_counter()
        codes = torch.ops.kt.quantize(weight, name, group_size, method)
        best = min(best, time.perf_counter() - start)
        moved = weight.nbytes + sum(tensor.nbytes for tensor in codes if tensor is not None)
    return best, moved


def main() -> int:
    parser = Parser("quantize", __doc__)
    parser.isa(several=True)
    parser.threads()
    writable = [name for name in names(written=True) if get_format(name).has_quantizer]
    parser.add_argument("--format", nargs="+", choices=writable, default=writable, metavar="NAME")
    options = parser.parse_args()
    dense = torch.randn(max(EXPERTS.values()), SIZE, SIZE, dtype=torch.bfloat16)
    bandwidth = Calibration(options.threads).bandwidth()
    lines: list[tuple[str, ...]] = []
    for isa in options.isa:
        for name, group_size, method in variants(options.format):
            weight = dense[: EXPERTS[method]]
            with ktops.use_isa(isa), threads(options.threads):
                seconds, moved = fastest_call(weight, name, group_size, method)
            rate, share = f"{weight.numel() / seconds / 1e6:.0f}", f"{moved / seconds / bandwidth:.2f}"
            lines.append((isa, name, str(group_size or "-"), method, rate, share))
    print(f"{options.threads} threads, {bandwidth / 1e9:.1f} GB/s")
    print_columns(HEAD, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
