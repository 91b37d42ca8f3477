"""Measures how much slower a call becomes while another process keeps one core busy.

    python -m bench.busy_core
    python -m bench.busy_core --shape dsv2_lite --tokens 512 --mode training

Quiet and busy samples alternate: the other process is stopped and continued. Each round yields the ratio of
the medians; the smallest, the median and the largest ratio are reported. With two threads on two cores, the
other process takes a quarter to a third of the machine, so a ratio of 1.33 to 1.5 is expected if threads take
tasks one by one. A fixed split costs about 2, and losing time slices at many barriers costs more.

Exit status: 0, or 1 if the median ratio exceeds --limit.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import ktops
from bench import report, results
from bench.arguments import OPS, Parser, positive
from bench.contest import say
from bench.layer import Layer, Variant
from bench.machine import Calibration

LIMIT = 2.5
_SETTLE_SECONDS = 0.05


class Burner:
    """A process that keeps one core busy inside the ``with`` block unless it is paused; it starts paused.

    Example:
        >>> with Burner() as burner:
        ...     burner.resume()
        ...     work()
        ...     burner.pause()
    """

    def __enter__(self) -> "Burner":
        code = "print(1, flush=True)\nwhile True: pass"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the burning process ended with status {self._process.wait()}")
        self.pause()
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()

    def pause(self) -> None:
        self._send(signal.SIGSTOP, os.WSTOPPED)

    def resume(self) -> None:
        self._send(signal.SIGCONT, os.WCONTINUED)

    def _send(self, sent: int, until: int) -> None:
        os.kill(self._process.pid, sent)
        os.waitid(os.P_PID, self._process.pid, until)
        time.sleep(_SETTLE_SECONDS)


def median_seconds(call: Callable[[], object], calls: int) -> float:
    """Returns the median time of ``calls`` calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def slowdown(call: Callable[[], object], burner: Burner, calls: int) -> tuple[float, float]:
    """Returns (quiet seconds, busy seconds) of one round; quiet is the mean of before and after."""
    before = median_seconds(call, calls)
    burner.resume()
    try:
        busy = median_seconds(call, calls)
    finally:
        burner.pause()
    return (before + median_seconds(call, calls)) / 2, busy


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("busy_core", __doc__)
    add = parser.add_argument
    parser.shape()
    parser.tokens(16, 512)
    parser.mode()
    parser.isa(several=True)
    parser.threads()
    parser.rounds(5)
    add("--calls", type=positive, default=5, help="calls per sample (default: %(default)s)")
    add("--limit", type=float, default=LIMIT, help="largest ratio that passes (default: %(default)s)")
    add("--save", action="store_true", help="write the rows to bench/results")
    parser.seed()
    return parser.parse_args(argv)


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("shape", "mode", "lora_rank", "tokens"))


def _case(layer: Layer, mode: str, tokens: int, isa: str, burner: Burner, args) -> dict:
    say(f"{layer.shape.name} T={tokens} {mode} {isa}")
    variant = Variant(16 if mode == "training" else 0)

    def call() -> None:
        OPS[mode].call(layer, variant, layer.inputs(tokens))

    with ktops.use_isa(isa):
        call()
        pairs = [slowdown(call, burner, args.calls) for _ in range(args.rounds)]
    ratios = sorted(busy / quiet for quiet, busy in pairs)
    return {
        "shape": layer.shape.name, "mode": mode, "tokens": tokens, "lora_rank": variant.rank, "isa": isa,
        "seconds": statistics.median(quiet for quiet, _ in pairs),
        "seconds_busy": statistics.median(busy for _, busy in pairs),
        "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    layer = Layer(args.shape, args.seed)
    with Burner() as burner:
        rows = [
            _case(layer, mode, tokens, isa, burner, args)
            for isa in args.isa
            for mode in args.mode
            for tokens in args.tokens
        ]
    report.print_busy_core(rows)
    if args.save:
        machine = results.machine_record(Calibration(args.threads))
        results.save_by_isa("busy_core", machine, rows, row_key)
    return 1 if any(row["ratio"] > args.limit for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
