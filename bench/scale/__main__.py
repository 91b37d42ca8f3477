"""Simulates one layer over several processes, sockets and hosts: python -m bench.scale measure|predict|check.

    python -m bench.scale measure --save        the parts of a layer's time on this machine, to bench/results
    python -m bench.scale predict               one layer of real models on servers, from the saved parts
    python -m bench.scale predict --write       the same into docs/scale.md
    python -m bench.scale check                 measure, then run the layer in one process and in two, with
                                                expert parallelism, and compare with the predictions
    python -m bench.scale check --ranks 4 --nodes 2
    torchrun --nnodes 2 --nproc-per-node 2 ... -m bench.scale check

measure and check start --ranks processes of torchrun, each bound to its part of the CPUs of --nodes NUMA
nodes; torchrun may also start them on several hosts. Parts and cases take turns, and of each the fastest call
counts, so that other load does no more than make the run longer. Results of ranks are compared with those of
one process before they are timed.

Exit status of check: 0, or 1 if a prediction differs from the measurement by more than 25 %.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

import ktops
from bench import report, results
from bench.arguments import Parser, positive
from bench.contest import say
from bench.machine import Calibration
from bench.scale import check, page, parts, predict
from bench.scale.measured import Measured, kernels_table, summary
from bench.scale.ranks import Ranks, divide, node_cpus, pin
from ktops.testing.torchrun import torchrun

_STATUS = "BENCH_SCALE_STATUS"  # the file for the exit status of rank 0, if this process starts the ranks


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("scale", __doc__)
    add = parser.add_argument
    add("command", choices=("measure", "predict", "check"))
    parser.shape()
    parser.tokens(1, 16, 512, 2048)
    parser.isa()
    add("--ranks", type=positive, default=2, metavar="R", help="processes (default: %(default)s)")
    add("--nodes", type=positive, metavar="M", help="NUMA nodes that they use (default: all)")
    parser.rounds(3)
    add(
        "--seconds", type=float, default=parts.SECONDS, help="for each part in a round (default: %(default)s)"
    )
    add("--save", action="store_true", help="write what was measured to bench/results")
    parser.seed()
    add("--skew", type=float, default=0.0, metavar="S",
        help="predict with experts whose popularity falls as n^-S (default: 0, all alike)")  # fmt: skip
    names = list(predict.MODELS)
    add(
        "--model", choices=names, nargs="+", default=names, metavar="NAME", help=f"predict {', '.join(names)}"
    )
    add("--write", action="store_true", help="write the predictions into docs/scale.md")
    args = parser.parse_args(argv)
    if args.command != "predict" and args.shape.num_experts % args.ranks:
        parser.error(f"--ranks must divide the {args.shape.num_experts} experts, got {args.ranks}")
    return args


def launch(args: argparse.Namespace, argv: list[str]) -> int:
    """Starts the ranks with torchrun; returns the exit status of rank 0."""
    command = torchrun(args.ranks, "--local-ranks-filter", 0, "-m", "bench.scale", *argv)
    with tempfile.NamedTemporaryFile() as file:  # torchrun would report status 1 as a crash
        variables = {"OMP_NUM_THREADS": "1", _STATUS: file.name}
        done = subprocess.run(command, cwd=results.ROOT, env={**os.environ, **variables})
        return done.returncode or int(file.read())


def fastest(passes: list[list[dict]]) -> list[dict]:
    """Returns the rows of all passes, of each the one with the fewest seconds."""
    best: dict[tuple, dict] = {}
    for row in (row for rows in passes for row in rows):
        known = best.setdefault(parts.key(row), row)
        if row["seconds"] < known["seconds"]:
            best[parts.key(row)] = row
    return list(best.values())


def best(machines: list[dict]) -> dict:
    """Returns the last record of a machine, with the highest peaks and read bandwidths of all."""

    def highest(values: list):
        if not isinstance(values[0], dict):
            return max(values)
        return {name: highest([value[name] for value in values]) for name in values[0]}

    limits = ("peak_flop_per_second", "read_bytes_per_second")
    return machines[-1] | {name: highest([machine[name] for machine in machines]) for name in limits}


def work(args: argparse.Namespace, ranks: Ranks) -> int:
    """Measures as one of the ranks; rank 0 reports."""
    shape, first = args.shape, ranks.rank == 0
    everything = parts.whole(shape, ranks.size, args.seed) if first else None
    each = shape.num_experts // ranks.size
    mine = (
        parts.part(shape, ranks.size, ranks.rank, args.seed)
        if everything is None
        else parts.some(everything, 0, each)
    )
    passes: list[list[dict]] = []
    machines: list[dict] = []
    took: check.Times = {}
    for number in range(args.rounds):
        if first:
            say(f"round {number + 1} of {args.rounds}")
            pin(ranks.host_cpus)
            machines.append(results.machine_record(Calibration(len(ranks.host_cpus))))
        passes.append(parts.measure(shape, everything, ranks, args.seconds))
        if args.command == "check":
            check.measure(shape, args.tokens, ranks, (mine, everything), took, args.seconds)
    if not first:
        return 0
    machine = best(machines)
    measured = Measured(shape, fastest(passes), machine, args.isa)
    report.print_columns(*kernels_table(measured))
    print("\n".join(summary(measured)))
    rows = [row | {"isa": args.isa} for row in measured.rows]
    failed = False
    if args.command == "check":
        checked = check.compared(measured, took, ranks)
        report.print_columns(*check.table(checked))
        failed = not all(check.within(row) for row in checked)
        rows += [row | {"isa": args.isa} for row in checked]
    if args.save:
        print(f"saved {results.save('scale', machine, args.isa, rows, parts.key)}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.command == "predict":
        if args.write:
            page.write()
        else:
            report.print_columns(predict.COLUMNS, predict.table(page.saved(), args.skew, tuple(args.model)))
        return 0
    if "RANK" not in os.environ:
        divide(node_cpus(), args.ranks, args.nodes)  # raises errors here rather than in every rank
        return launch(args, sys.argv[1:] if argv is None else argv)
    ranks = Ranks.join(args.nodes)
    with ktops.use_isa(args.isa):
        status = work(args, ranks)
    dist.barrier()  # nobody leaves while others may need it
    time.sleep(0.1)  # for threads of gloo that still free the last exchange, which could abort the process
    dist.destroy_process_group()
    if _STATUS not in os.environ:
        return status
    if ranks.rank == 0:
        Path(os.environ[_STATUS]).write_text(str(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
