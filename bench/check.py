"""Checks what no test asserts because it depends on the machine: times, ratios, where tasks run, memory.

    python -m bench.check
    python -m bench.check --save
    python -m bench.check --against main

Prints one line per check: measured, limit, held. Run it on an otherwise idle machine. The checks use the
median or the best of several rounds, but other work can still make one fail. --against also compares HEAD
with another revision, as bench.regression does.

Exit status: 0 if every check held, otherwise 1.
"""

import argparse
import gc
import math
import mmap
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import ktops
from bench import busy_core, memory, overhead, profile, regression, report, results
from bench.arguments import OPS, Parser
from bench.contest import say
from bench.layer import Layer, Variant
from bench.machine import Calibration, OtherLoad, cpu_model
from bench.shapes import Shape
from ktops.numa.topology import pretend, set_homes
from ktops.testing.compare import one_thread, threads

SHAPE = Shape("small", 1024, 512, 16, 2)
TOKENS = 1024
WIDE = Shape("wide", 64, 2048, 4, 2)
"""A layer whose intermediate results are far larger than its weights, inputs and outputs."""

ROUNDS = 5
MAPPED = 40 * memory.MIB


@dataclass(frozen=True)
class Check:
    """A figure and its limit, which it must not exceed or, with at_least, must reach.

    excused: the check held anyway because the figure is within its spread.
    """

    name: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False
    excused: bool = False

    def row(self) -> dict:
        """Returns the check as tables and files show it."""
        held = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return {
            "check": self.name, "measured": float(self.measured), "limit": float(self.limit),
            "bound": "at least" if self.at_least else "at most", "unit": self.unit,
            "held": held or self.excused,
        }  # fmt: skip


def call_overhead() -> Iterator[Check]:
    """Compares a tiny call with the same layer built from PyTorch's operators, alternating the two."""
    function, arguments = overhead.tiny_call()
    ratios = []
    with one_thread(), torch.no_grad():
        for _ in range(ROUNDS):
            seconds = overhead.best_seconds(function, 100)
            others = overhead.best_seconds(lambda: overhead.layer_of_operators(arguments), 100)
            ratios.append(seconds / others)
    name = "one token, tiny layer: time relative to PyTorch's operators"
    yield Check(name, statistics.median(ratios), overhead.LIMIT)


def steps_of_a_call() -> Iterator[Check]:
    """Measures the part of a call outside the steps of ktops.profile: PyTorch's path to the operator."""
    layer = Layer(SHAPE, seed=0)
    shares = []
    for _ in range(2 * ROUNDS):
        inputs = layer.inputs(TOKENS)
        with ktops.profile() as steps:
            start = time.perf_counter()
            OPS["forward"].call(layer, Variant(), inputs)
            elapsed = time.perf_counter() - start
        shares.append(1 - sum(step.wall for step in steps.steps) / elapsed)
    yield Check(f"T={TOKENS}: share of a call outside its steps", min(shares), 0.05)


def peak_of_a_step() -> Iterator[Check]:
    """Checks that no product is faster than the peak that rooflines are based on."""
    isa = ktops.cpu_capability()
    layer, calibration = Layer(SHAPE, seed=0), Calibration(torch.get_num_threads(), 64 << 20)
    limits = calibration.limits(isa, "bfloat16")
    steps, experts = profile.profile_calls("forward", layer, TOKENS, 0, calls=ROUNDS)
    work = profile.step_work(SHAPE, TOKENS, experts, 0)
    rates = [work[step.op, step.name].flops / step.wall for step in steps if step.name in ("gate_up", "down")]
    yield Check(f"T={TOKENS}: fastest product relative to the peak of {isa}", max(rates) / limits.peak, 1.25)
    from_l2 = calibration.peak(isa, "bfloat16", from_l2=True)
    yield Check(f"products in L2 relative to the peak of {isa}", from_l2 / limits.peak, 1.25)
    cached = statistics.median(calibration.cache_read() for _ in range(ROUNDS))
    each = limits.bandwidth / calibration.num_threads
    yield Check("cache read bandwidth relative to memory, one thread", cached / each, 1, at_least=True)


def order_of_rows() -> Iterator[Check]:
    """Checks that whichever of avx512 and avx512_bf16 has the higher peak comes first."""
    rows = [row for row, available in ktops.cpu_capabilities().items() if available and "avx512" in row]
    if len(rows) == 2:
        first, second = (
            max(torch.ops.kt.measure_peak(row, "bfloat16", 20_000) for _ in range(50)) for row in rows
        )
        yield Check(f"peak of {rows[0]} relative to {rows[1]}", first / second, 1.25, at_least=True)


def a_busy_core() -> Iterator[Check]:
    """Runs bench.busy_core. A call lasts several time slices; losing many at barriers exceeds the limit."""
    layer = Layer(SHAPE, seed=0)
    with busy_core.Burner() as burner:
        for mode, op in OPS.items():
            variant, inputs = Variant(16 if mode == "training" else 0), layer.inputs(TOKENS)
            pairs = [
                busy_core.slowdown(lambda: op.call(layer, variant, inputs), burner, calls=5)  # noqa: B023
                for _ in range(ROUNDS)
            ]
            slowdown = statistics.median(busy / quiet for quiet, busy in pairs)
            yield Check(f"T={TOKENS}, {mode}: slowdown with a busy core", slowdown, busy_core.LIMIT)
        burner.resume()
        with OtherLoad() as load:
            time.sleep(0.5)
        burner.pause()
    yield Check("measured load of a process that keeps a core busy", load.cores, 0.5, "cores", at_least=True)


def tasks_at_home() -> Iterator[Check]:
    """Counts the tasks that ran on the NUMA node of their weights; without several nodes, it pretends two."""
    nodes = ktops.numa.nodes()
    cores = sum(len(node.cores) for node in nodes)
    if min(cores, torch.get_num_threads()) < 2:
        return
    set_homes(nodes if len(nodes) > 1 else pretend(nodes, "2"))
    layer, shares = Layer(SHAPE, seed=0), []
    try:
        for _ in range(4 * ROUNDS):
            inputs = layer.inputs(TOKENS)
            with ktops.profile() as steps:
                OPS["forward"].call(layer, Variant(), inputs)
            shares.append(steps.at_home or 0.0)
    finally:
        torch.ops.kt.set_numa_nodes([], [])
    yield Check(
        f"T={TOKENS}: share of tasks on their NUMA node", statistics.median(shares), 0.95, at_least=True
    )


def resident_memory() -> Iterator[Check]:
    """Measures what a call adds beyond its results, what forward saves, and the counted scratch memory."""
    memory.reset_peak()
    before = memory.resident_bytes()
    fresh = mmap.mmap(-1, MAPPED)  # malloc may hand out pages that are resident
    torch.frombuffer(fresh, dtype=torch.uint8).fill_(1)
    seen = memory.resident_bytes(peak=True) - before
    gc.collect()
    fresh.close()
    yield Check("measured resident memory of 40 MiB", seen / memory.MIB, 35, "MiB", at_least=True)
    for save in ("activations", "recompute"):
        usage = memory.measure(Layer(WIDE, seed=0), 2048, 4, save)
        rest = (usage.extra - usage.saved - usage.scratch) / memory.MIB
        yield Check(f"unaccounted resident memory of a call, save={save!r}", rest, 16, "MiB")
    layer = Layer(SHAPE, seed=0)
    weights = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
    share = memory.measure(layer, 32, 0).extra / weights
    yield Check("T=32: resident memory of a call relative to the weights", share, 0.25)
    memory.measure(Layer(WIDE, seed=0), 2048, 4)
    before, idle = memory.resident_bytes(), ktops.memory_stats()["bytes_idle"]
    ktops.empty_cache()
    if idle:
        returned = (before - memory.resident_bytes()) / idle
        yield Check("share of idle scratch memory that empty_cache returns", returned, 0.9, at_least=True)


CHECKS = (
    call_overhead, steps_of_a_call, peak_of_a_step, order_of_rows, a_busy_core, tasks_at_home, resident_memory
)  # fmt: skip


def against(revision: str, num_threads: int) -> Iterator[Check]:
    """Compares HEAD with a revision, one check per case."""
    arguments = regression.parse_arguments(
        [revision, "HEAD", "--shape", "1024,512,16,2", "--tokens", "1", "128", "--threads", str(num_threads)]
    )
    for row in regression.measure(arguments):
        name = f"T={row['tokens']}, {row['mode']}: time of HEAD relative to {revision}"
        ratio = row.get("ratio", math.inf)  # absent if the result was wrong or no sample was quiet
        yield Check(name, ratio, arguments.threshold, excused=row["status"] == "ok")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("check", __doc__)
    parser.threads()
    parser.add_argument("--against", metavar="REV", help="a revision that HEAD must not be slower than")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    isa, rows = ktops.cpu_capability(), []
    with threads(args.threads):
        for check in CHECKS:
            say(check.__name__)
            rows += [{**found.row(), "isa": isa} for found in check()]
        if args.against:
            rows += [{**found.row(), "isa": isa} for found in against(args.against, args.threads)]
        print(f"{cpu_model()}, {args.threads} threads, {isa} kernels")
        report.print_check(rows)
        if args.save:
            machine = results.machine_record(Calibration(args.threads))
            results.save_by_isa("check", machine, rows, lambda row: (row["check"],))
    failed = [row["check"] for row in rows if not row["held"]]
    print(f"failed: {'; '.join(failed)}" if failed else "all held")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
