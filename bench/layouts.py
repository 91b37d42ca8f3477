"""Compares what experts compute, and how their weights lie, with the plain layout in bfloat16.

    python -m bench.layouts --isa avx512_bf16 --save
    python -m bench.layouts --layout clamped gpt_oss --tokens 2048 --mode forward --rounds 21

The layouts are those of bench.shapes.LAYOUTS, and "float16": the plain one in that dtype. Modes are forward,
training (with LoRA on both projections) and full (training of the weights). Each layout takes turns with the
plain one, A B B A, in one process, with cold weights and fresh inputs. A figure is the time of the plain
layout divided by that of the other in the same round, the median of the rounds; in brackets the middle half.
The result of a first call is compared with the reference.

Exit status: 0, or 1 if a result was wrong.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import torch

import ktops
from bench import report, results
from bench.arguments import OPS, Parser
from bench.contest import say
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.shapes import LAYOUTS
from bench.verify import WrongResult

SHAPE = "2048,768,32,2"  # a quarter of the experts and of the routes of qwen3_30b
TOKENS = (1, 16, 512, 2048)
MODES = {
    "forward": ("forward", Variant()),
    "training": ("training", Variant(16)),
    "full": ("training", Variant(full=True)),
}
NAMES = (*(name for name in LAYOUTS if name != "plain"), "float16")
_TURN_SECONDS = 0.1


Clock = Callable[[], float]


def timed(layer: Layer, mode: str, tokens: int, layout: str, clock: Clock) -> Callable[[], float]:
    """Returns a function that makes a call with fresh inputs and returns its seconds.

    Raises:
        WrongResult: the result of a first call differs from the reference.
    """
    name, variant = MODES[mode]
    op, variant = OPS[name], dataclasses.replace(variant, layout=layout)

    def call() -> float:
        inputs = layer.inputs(tokens, layout=variant.experts)
        start = clock()
        op.call(layer, variant, inputs)
        return clock() - start

    inputs = layer.inputs(tokens, layout=variant.experts)
    op.check(layer, variant, inputs, op.call(layer, variant, inputs))
    return call


def turn(call: Callable[[], float]) -> float:
    """Returns the median seconds of one call, or of as many as fit in a turn."""
    seconds = [call()]
    while sum(seconds) < _TURN_SECONDS:
        seconds.append(call())
    return statistics.median(seconds)


def compare(a: Callable[[], float], b: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """Returns the seconds of a and b in each round. Their order is reversed in every other round."""
    pairs = []
    for number in range(rounds):
        if number % 2 == 0:
            first = turn(a)
            pairs.append((first, turn(b)))
        else:
            first = turn(b)
            pairs.append((turn(a), first))
    return pairs


def figures(pairs: list[tuple[float, float]]) -> dict:
    """Returns the columns of a row, from the seconds of the plain layout and of the other in each round."""
    speeds = sorted(plain / other for plain, other in pairs)
    quarter = len(speeds) // 4
    return {
        "seconds": statistics.median(other for _, other in pairs),
        "plain_seconds": statistics.median(plain for plain, _ in pairs),
        "speed": statistics.median(speeds),
        "speed_low": speeds[quarter],
        "speed_high": speeds[-1 - quarter],
        "status": "ok",
    }


def measure(layers: dict[str, Layer], mode: str, tokens: int, args: argparse.Namespace) -> list[dict]:
    """Returns a row per layout; one whose result is wrong has no figures."""
    shape, clock = args.shape.name, time.process_time if args.cpu_time else time.perf_counter
    plain = timed(layers["bfloat16"], mode, tokens, "plain", clock)
    rows = []
    for name in args.layout:
        dtype, layout = ("float16", "plain") if name == "float16" else ("bfloat16", name)
        row = {"layout": name, "shape": shape, "mode": mode, "tokens": tokens}
        try:
            other = timed(layers[dtype], mode, tokens, layout, clock)
            row |= figures(compare(plain, other, args.rounds))
        except WrongResult as wrong:
            row |= {"status": "wrong", "message": str(wrong)}
        say(f"{mode} T={tokens} {name}: {row.get('message') or report.speed(row)}")
        rows.append(row)
    return rows


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return row["shape"], NAMES.index(row["layout"]), list(MODES).index(row["mode"]), row["tokens"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("layouts", __doc__)
    add = parser.add_argument
    parser.shape(SHAPE)
    parser.tokens(*TOKENS)
    add("--mode", choices=list(MODES), nargs="+", default=list(MODES), help="default: all three")
    add("--layout", choices=NAMES, nargs="+", default=NAMES, help="default: all")
    parser.isa(several=True)
    parser.threads()
    parser.rounds(9)
    add("--cpu-time", action="store_true",
        help="count CPU seconds, with --threads 1 on a machine that others use")  # fmt: skip
    add("--save", action="store_true", help="write the rows to bench/results")
    parser.seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    names = ("bfloat16", "float16") if "float16" in args.layout else ("bfloat16",)
    layers = {name: Layer(args.shape, args.seed, getattr(torch, name)) for name in names}
    rows: list[dict] = []
    for isa in args.isa:
        say(f"{isa}:")
        with ktops.use_isa(isa):
            for mode in args.mode:
                for tokens in args.tokens:
                    found = measure(layers, mode, tokens, args)
                    rows += [{**row, "isa": isa} for row in found]
    report.print_layouts(rows)
    if args.save:
        machine = results.machine_record(Calibration(args.threads))
        results.save_by_isa("layouts", machine, rows, row_key)
    return results.exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
