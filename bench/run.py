"""Measures kt::moe_fwd and kt::moe_sft and compares them with the limits of this machine.

    python -m bench.run --quick
    python -m bench.run --shape qwen3_30b --tokens 1 2048 --mode forward --json rows.jsonl --plot rows.png
    python -m bench.run --isa all --rank 8 16 64 128 --mode training --tokens 512 --save

Each row is one layer: the median time of a call, and the roofline max(flops / peak, bytes / bandwidth) of
that call divided by its time. Peak and bandwidth are measured before and after every sample, configurations
take turns, weights are cold and inputs fresh. Samples during which other processes used more than --max-load
cores are dropped and repeated. "undisturbed" is the median over the calls (in brackets, how many) during
which no other virtual machine slowed the cores down either, according to cache reads before and after. A row
whose result differs from the reference has no figure and reads WRONG. --save writes the rows to
bench/results, where rows of other configurations stay.

Exit status: 0, or 1 if a result was wrong, or 3 if a configuration never had a quiet sample.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench import report, results
from bench.arguments import OPS, Parser, lora_rank
from bench.layer import ROUTINGS, Layer, Variant
from bench.machine import Calibration, OtherLoad, last_level_cache_bytes
from bench.measure import Configuration, Plan, measure
from bench.shapes import LAYOUTS, QUICK_TOKENS, TOKENS

DEFAULT_RANKS = {"forward": [0], "training": [16]}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SLOW_SECONDS = 5.0
ROUNDS, QUICK_ROUNDS = 7, 3


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("run", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"T in {QUICK_TOKENS} with fewer and shorter samples")
    parser.shape("all three", several=True)
    parser.tokens()
    parser.mode()
    add("--rank", type=lora_rank, nargs="+", metavar="R", help="LoRA ranks (default: forward 0, training 16)")
    parser.isa(several=True)
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="default: %(default)s")
    add("--routing", choices=ROUTINGS, default="random",
        help="skewed: expert 0 gets half of the tokens (default: %(default)s)")  # fmt: skip
    add("--layout", choices=list(LAYOUTS), nargs="+", default=["plain"], help="default: plain")
    add("--full", action="store_true", help="also train the weights (their gradients take as much memory)")
    add("--recompute", action="store_true", help='train with save="recompute"')
    parser.threads()
    parser.rounds(ROUNDS, QUICK_ROUNDS)
    parser.max_load()
    add("--save", action="store_true", help="write the rows to bench/results")
    add("--json", type=Path, metavar="FILE", help="write JSON lines")
    add("--plot", type=Path, metavar="FILE", help="write a plot (needs matplotlib)")
    parser.seed()
    return parser.parse_args(argv)


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    layers = [Layer(shape, args.seed, DTYPES[args.dtype]) for shape in args.shape]
    save = "recompute" if args.recompute else "activations"

    def variant(mode: str, rank: int, layout: str) -> Variant:
        if mode == "forward":
            return Variant(rank, routing=args.routing, layout=layout)
        return Variant(rank, save, args.full, args.routing, layout)

    return [
        Configuration(OPS[mode], isa, layer, num_tokens, variant(mode, rank, layout))
        for layer in layers
        for num_tokens in tokens
        for mode in args.mode
        for rank in (args.rank if args.rank is not None else DEFAULT_RANKS[mode])
        for layout in args.layout
        for isa in args.isa
    ]


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    names = ("shape", "dtype", "mode", "routing", "save", "full", "layout", "lora_rank", "tokens")
    return tuple(row[name] for name in names)


def _plan(args: argparse.Namespace) -> Plan:
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    return Plan(rounds, 0.3 if args.quick else 0.5, args.max_load, 3 * rounds, SLOW_SECONDS)


def _remarks(rows: list[dict], configurations: list[Configuration], plan: Plan, load: float) -> None:
    dropped = sum(row["dropped_samples"] for row in rows)
    kept = sum(row["samples"] for row in rows)
    print(
        f"{kept} samples kept, {dropped} dropped because other processes used more than {plan.max_load:g} "
        f"of a core; over the whole run they used {load:.2f} cores"
    )
    cache = last_level_cache_bytes()
    for layer in dict.fromkeys(config.layer for config in configurations):
        size = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
        if size < 2 * cache:
            print(f"{layer.shape.name}: weights of {size / 2**20:.1f} MiB fit in the caches: not cold")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    calibration = Calibration(args.threads)
    machine = results.machine_record(calibration)
    report.print_machine(machine)

    configurations, plan = _configurations(args), _plan(args)
    with OtherLoad() as load:
        measure(configurations, calibration, plan)
    rows = [config.record() for config in configurations]
    report.print_table(rows)
    _remarks(rows, configurations, plan, load.cores)
    if args.save:
        results.save_by_isa("run", machine, rows, row_key)
    if args.json:
        report.write_json(args.json, machine, rows)
    if args.plot:
        report.write_plot(args.plot, machine, rows)
    return results.exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
