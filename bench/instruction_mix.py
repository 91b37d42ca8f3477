"""Counts the tile instructions of the amx_bf16 kernels with the AMX emulator.

    python -m bench.instruction_mix
    python -m bench.instruction_mix --shape dsv2_lite --rows 32 48 --rank 16

Every expert gets exactly --rows rows. "per load" is the number of dot products (TDPBF16PS) per tile load. A
core issues a tile load in 8 cycles and a dot product in 16, so above 0.5 the dot products dominate, and each
load saved leaves room for a cache miss. Results are compared with the reference; a mismatch is an error.

The command restarts itself under the emulator (ktops.testing.amx_emulator). The CPU must support AVX512_BF16.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from bench import moe_fwd, moe_sft
from bench.arguments import Parser, lora_rank, positive
from bench.layer import Inputs, Layer, Variant
from bench.shapes import Shape
from ktops.testing import amx_emulator

ROWS = (32, 64, 128)
DEFAULT_SHAPE = "512,384,4,2"
CALLS = {"forward": moe_fwd, "forward+backward": moe_sft}
COLUMNS = (
    "shape", "rows", "mode", "LoRA r", "dot products", "loads", "per load", "stores", "zeros", "configs",
)  # fmt: skip


def balanced_inputs(layer: Layer, rows: int) -> Inputs:
    """Returns inputs that give every expert ``rows`` rows.

    Raises:
        ValueError: rows times num_experts is not a multiple of top_k.
    """
    experts, top_k = layer.shape.num_experts, layer.shape.top_k
    if rows * experts % top_k:
        raise ValueError(f"rows * num_experts must be a multiple of top_k={top_k}, got {rows} * {experts}")
    tokens = rows * experts // top_k
    ids = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    return dataclasses.replace(layer.inputs(tokens), topk_ids=ids)


def count(layer: Layer, rows: int, mode: str, variant: Variant) -> Counter:
    """Returns the tile instructions of one call, by name; this process must run under the emulator.

    Raises:
        bench.verify.WrongResult: the call's result is wrong.
    """
    op, inputs = CALLS[mode], balanced_inputs(layer, rows)
    before = amx_emulator.counts()
    result = op.call(layer, variant, inputs)
    executed = amx_emulator.counts()
    executed.subtract(before)
    op.check(layer, variant, inputs, result)
    return executed


def record(shape: Shape, rows: int, mode: str, variant: Variant, threads: int, executed: Counter) -> dict:
    """Returns one measurement as plain values."""
    dot_products = sum(executed[name] for name in amx_emulator.DOT_PRODUCTS)
    loads = sum(executed[name] for name in amx_emulator.LOADS)
    return {
        "shape": shape.name,
        "rows_per_expert": rows,
        "mode": mode,
        "lora_rank": variant.rank,
        "full": variant.full,
        "threads": threads,
        "dot_products_per_load": dot_products / loads if loads else None,
        "instructions": dict(executed),
    }


def _cells(row: dict) -> tuple[str, ...]:
    executed, ratio = row["instructions"], row["dot_products_per_load"]
    return (
        row["shape"],
        str(row["rows_per_expert"]),
        row["mode"] + (", full" if row["full"] else ""),
        str(row["lora_rank"]),
        str(sum(executed[name] for name in amx_emulator.DOT_PRODUCTS)),
        str(sum(executed[name] for name in amx_emulator.LOADS)),
        "no loads" if ratio is None else f"{ratio:.3f}",
        str(executed["tilestored"]),
        str(executed["tilezero"]),
        f"{executed['ldtilecfg']} + {executed['tilerelease']}",
    )


def print_table(rows: list[dict]) -> None:
    """Prints one line per measurement; configs: LDTILECFG + TILERELEASE."""
    table = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("instruction_mix", __doc__)
    add = parser.add_argument
    parser.shape(DEFAULT_SHAPE, several=True)
    add("--rows", type=positive, nargs="+", default=list(ROWS), metavar="N", help="rows per expert")
    add("--mode", choices=list(CALLS), nargs="+", default=list(CALLS))
    add("--rank", type=lora_rank, nargs="+", default=[0, 16], metavar="R", help="LoRA ranks (default: 0 16)")
    add("--full", action="store_true", help="also compute the gradients of the base weights")
    parser.threads()
    add("--json", type=Path, metavar="FILE", help="write JSON lines")
    parser.seed()
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> list[dict]:
    """Measures all rows; this process must run under the emulator."""
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shape:
        layer = Layer(shape, args.seed)
        for rank in args.rank:
            for mode in args.mode:
                variant = Variant(rank, full=args.full and mode != "forward")
                for n in args.rows:
                    executed = count(layer, n, mode, variant)
                    rows.append(record(shape, n, mode, variant, args.threads, executed))
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        amx_emulator.counts()
    except RuntimeError:
        arguments = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "bench.instruction_mix", *arguments]
        root = Path(__file__).parents[1]
        env = amx_emulator.row_environment(path=[root])
        return subprocess.run(command, env=env).returncode
    rows = measure(args)
    print_table(rows)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
