"""Measures how the time of one layer grows with tokens, experts, intermediate size, LoRA rank and threads.

    python -m bench.scaling --shape qwen3_30b --isa avx512_bf16 --save
    python -m bench.scaling --sweep tokens threads --plot scaling.svg

One size varies at a time. The others are those of the shape, with --tokens tokens and LoRA rank 16. Samples
are taken and checked as in bench.run. --save writes the points to bench/results, where those of other sweeps
stay.

Exit status: 0, or 1 if a result was wrong, or 3 if a point never had a quiet sample.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import report, results
from bench.arguments import OPS, Parser, positive
from bench.contest import say
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.measure import Configuration, Plan, measure
from bench.run import SLOW_SECONDS
from bench.shapes import Shape

RANK = 16
SWEEPS = {
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    "num_experts": (8, 16, 32, 64, 128, 256),
    "intermediate_size": (192, 384, 768, 1536),
    "lora_rank": (4, 8, 16, 32, 64, 128, 256),
    "threads": (),
}
"""Maps each varied quantity to its values; threads take powers of two up to --threads."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point: the value of the sweep, and all other settings there."""

    sweep: str
    value: int
    shape: Shape
    tokens: int
    rank: int
    threads: int


def values(sweep: str, base: Shape, threads: int) -> list[int]:
    """Returns the values of a sweep for a shape, with at least top_k experts."""
    if sweep == "threads":
        return sorted({1 << i for i in range(threads.bit_length()) if 1 << i <= threads} | {threads})
    return [value for value in SWEEPS[sweep] if sweep != "num_experts" or value >= base.top_k]


def points(sweep: str, base: Shape, tokens: int, threads: int) -> Iterator[Point]:
    """Returns the points of a sweep, smallest value first."""
    for value in values(sweep, base, threads):
        point = Point(sweep, value, base, tokens, RANK, threads)
        changed: dict[str, Any] = {"rank" if sweep == "lora_rank" else sweep: value}
        if sweep in ("num_experts", "intermediate_size"):
            changed = {"shape": dataclasses.replace(base, **changed)}
        yield dataclasses.replace(point, **changed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scaling", __doc__)
    add = parser.add_argument
    parser.shape()
    add("--sweep", choices=list(SWEEPS), nargs="+", default=list(SWEEPS), help="default: all")
    add("--tokens", type=positive, default=512, metavar="T", help="default: %(default)s")
    parser.mode()
    parser.isa()
    parser.threads()
    parser.rounds(3)
    parser.max_load()
    add("--save", action="store_true", help="write the points to bench/results")
    add("--plot", type=Path, metavar="FILE", help="write a plot (needs matplotlib)")
    parser.seed()
    return parser.parse_args(argv)


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("shape", "mode", "sweep", "value"))


def _measure(point: Point, layer: Layer, args: argparse.Namespace) -> list[dict]:
    """Returns the rows of one point, one per mode; the sweep of LoRA ranks is for training only."""
    modes = [mode for mode in args.mode if mode == "training" or point.sweep != "lora_rank"]
    configurations = [
        Configuration(
            OPS[mode], args.isa, layer, point.tokens, Variant(point.rank if mode == "training" else 0)
        )
        for mode in modes
    ]
    torch.set_num_threads(point.threads)
    plan = Plan(args.rounds, 0.3, args.max_load, 3 * args.rounds, SLOW_SECONDS)
    measure(configurations, Calibration(point.threads), plan)
    sizes = {name: getattr(point.shape, name) for name in ("num_experts", "intermediate_size")}
    extra = {"sweep": point.sweep, "value": point.value, "threads": point.threads, **sizes}
    return [{**c.record(), **extra, "shape": args.shape.name} for c in configurations]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    machine = results.machine_record(Calibration(args.threads))
    report.print_machine(machine)
    rows: list[dict] = []
    layer = None
    for sweep in args.sweep:
        for point in points(sweep, args.shape, args.tokens, args.threads):
            say(f"{sweep} = {point.value}")
            if layer is None or layer.shape != point.shape:
                layer = None
                layer = Layer(point.shape, args.seed)
            rows += _measure(point, layer, args)
        if args.save:
            results.save("scaling", machine, args.isa, rows, row_key)
    torch.set_num_threads(args.threads)
    report.print_scaling(rows)
    if args.save:
        print(f"saved {results.result_file('scaling', machine, args.isa)}")
    if args.plot:
        from bench.plots import write_scaling

        write_scaling(args.plot, {"machine": machine, "isa": args.isa, "rows": rows})
    return results.exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
