"""Compares ktops with its peers, taking turns on the same layer and inputs, with every result checked.

    python -m bench.peers --shape qwen3_30b
    python -m bench.peers --isa avx512_bf16 --tokens 1 16 --mode forward --save
    python -m bench.peers --peer zentorch=VENV/bin/python --peer kt-kernel=VENV/bin/python

Forward runs without LoRA, training (forward and backward) with LoRA on both projections. Contestants run in
worker processes: one for ktops, one for peers that need only torch, and one for each environment given by
--peer. Other peers are left out with a message. The figures are milliseconds of the median call, with the
fraction of the roofline of ktops' kernels, and at the end the speedup of ktops over the best peer. If --isa
is not the best of the machine, peers are restricted, as far as they allow, to the instructions of that ISA
and of those that come after it. A wrong result has no figure.

Exit status: 0, or 1 if a result was wrong, or 3 if ktops never had a quiet sample.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import ktops
from bench import report, results
from bench.arguments import OPS, Parser, positive
from bench.contest import ContestError, Entrant, Turns, Worker, contest, inputs_around, say
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.measure import mean_limits
from bench.peers import CONTESTANTS, HOMES, OBEYS, PARITY, TUNED_MALLOC
from bench.shapes import QUICK_TOKENS, TOKENS

_LAYER = "layer.pt"
ROUNDS, QUICK_ROUNDS = 3, 2

PEER_BUDGETS = 2.0
"""Peers round every intermediate result to bfloat16, which costs 1.5 to 2 times (ktops.testing.budgets)."""


def environment(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in HOMES or not Path(python).exists():
        expected = f"NAME=PYTHON with NAME one of {', '.join(HOMES)} and an interpreter that exists"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return name, python


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("peers", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"T in {QUICK_TOKENS} and two short rounds")
    parser.shape("all three", several=True)
    parser.tokens()
    parser.mode()
    add("--rank", type=positive, default=16, metavar="R", help="LoRA rank of training (default: %(default)s)")
    parser.isa()
    add("--peer", type=environment, action="append", default=[], metavar="NAME=PYTHON",
        help=f"interpreter of the environment of a peer: {', '.join(HOMES)}")  # fmt: skip
    names = [entry.name for entry in CONTESTANTS]
    add("--only", choices=names, nargs="+", metavar="NAME", help=f"ktops and these: {', '.join(names)}")
    add("--malloc", choices=("tuned", "default"), default="tuned",
        help="for the torch peers; tuned keeps freed blocks, faster (default: %(default)s)")  # fmt: skip
    parser.threads()
    parser.rounds(ROUNDS, QUICK_ROUNDS)
    parser.max_load()
    add("--save", action="store_true", help="write the rows to bench/results")
    parser.seed()
    return parser.parse_args(argv)


def _entries(args: argparse.Namespace, mode: str) -> dict[str, list]:
    """Returns {home: contestants} for those that support the mode, are requested and have an environment."""
    pythons = {"ktops": sys.executable, "torch": sys.executable, **dict(args.peer)}
    homes: dict[str, list] = {}
    for entry in CONTESTANTS:
        if args.only and entry.name not in {"ktops", *args.only}:
            continue
        if mode not in entry.modes:
            continue
        if entry.home in pythons:
            homes.setdefault(entry.home, []).append(entry)
        else:
            say(f"{entry.name}: left out, no environment (--peer {entry.home}=PYTHON)")
    return homes


def parity(isa: str) -> dict[str, str]:
    """Returns the environment of peers compared with the ``isa`` kernels: all instructions of the CPU except
    those of kernels that ktops ranks higher. Where ``avx512`` is faster, its peers may use AVX512_BF16."""
    ranking = ktops.cpu_capabilities()
    left = list(ranking)[list(ranking).index(isa) :]
    return PARITY[next(row for row in PARITY if row == isa or (row in left and ranking[row]))]


def _start(home: str, args: argparse.Namespace, scratch: Path) -> Worker:
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    if home == "ktops":
        return Worker(sys.executable, {**environment, "KTOPS_ISA": args.isa}, scratch / "ktops.log",
                      Path(ktops.__file__).parents[1])  # fmt: skip
    environment |= parity(args.isa)
    if home == "torch" and args.malloc == "tuned":
        environment |= TUNED_MALLOC
    return Worker(dict(args.peer).get(home, sys.executable), environment, scratch / f"{home}.log")


def _load(homes: dict, layer: Layer, args: argparse.Namespace, scratch: Path) -> tuple[dict, list[Worker]]:
    """Returns ({contestant: its worker}, workers), each worker with the layer; leaves out what cannot run."""
    holders: dict[str, Worker] = {}
    workers = []
    for home, entries in homes.items():
        say(f"{layer.shape.name}: loading {', '.join(entry.name for entry in entries)}")
        worker = _start(home, args, scratch)
        workers.append(worker)
        modules = {e.name: {"module": e.module, "options": e.options} for e in entries}
        try:
            reply = worker.ask(
                "load", file=str(scratch / _LAYER), rank=args.rank, threads=args.threads, contestants=modules
            )
        except ContestError as error:
            reply = {"unavailable": {entry.name: str(error) for entry in entries}}
        for name, missing in reply["unavailable"].items():
            if missing:
                say(f"{name}: left out, {missing}")
            else:
                holders[name] = worker
    return holders, workers


def _row(entrant: Entrant, case: dict, limit: float) -> dict:
    row = case | {
        "contestant": entrant.name,
        "status": entrant.status,
        "samples": len(entrant.samples),
        "dropped_samples": entrant.dropped,
    }
    if entrant.failure:
        row["message"] = entrant.failure
    elif entrant.seconds is not None:
        low, high = entrant.spread()
        row |= {
            "seconds": entrant.seconds,
            "seconds_min": low,
            "seconds_max": high,
            "limit_seconds": limit,
            "fraction": limit / entrant.seconds,
            "relative_error": entrant.error,
        }
    return row


def _case(layer: Layer, mode: str, tokens: int, holders: dict, args, calibration, scratch) -> list[dict]:
    """Returns the rows of one shape, mode and number of tokens."""
    rank = args.rank if mode == "training" else 0
    op, variant, calls = OPS[mode], Variant(rank), inputs_around(layer, tokens)
    modes = {entry.name: entry.modes for entry in CONTESTANTS}
    entrants = [Entrant(name, worker) for name, worker in holders.items() if mode in modes[name]]
    say(f"{layer.shape.name} T={tokens} {mode}: {', '.join(entrant.name for entrant in entrants)}")

    def check(entrant: Entrant, inputs, result) -> float:
        return op.check(layer, variant, inputs, result, 1.0 if entrant.name == "ktops" else PEER_BUDGETS)

    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    turns = Turns(rounds, 0.1 if args.quick else 0.3, args.max_load, 3 * rounds)
    before = calibration.limits(args.isa, "bfloat16")
    contest(entrants, mode, calls, check, turns, scratch)
    after = calibration.limits(args.isa, "bfloat16")
    limits = mean_limits(before, after)
    experts = sum(inputs.distinct_experts for inputs in calls) // len(calls)
    work = op.work(layer.shape, tokens, experts, variant)
    case = {"shape": layer.shape.name, "mode": mode, "tokens": tokens, "lora_rank": rank, "isa": args.isa}
    case |= {"bound": work.bound(limits), "malloc": args.malloc}
    for entrant in entrants:
        if entrant.failure:
            say(f"{'WRONG' if entrant.wrong else 'failed'} {entrant.name}: {entrant.failure}")
    return [_row(entrant, case, work.seconds(limits)) for entrant in entrants]


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("shape", "mode", "lora_rank", "tokens", "contestant"))


def _parity_remark(isa: str) -> str:
    held = [f"{home}: {how}" for home, how in OBEYS.items()]
    variables = " ".join(f"{name}={value}" for name, value in parity(isa).items())
    return f"peers of the {isa} kernels run with {variables} ({'; '.join(held)})"


def _mode_rows(layer: Layer, mode: str, args, calibration, scratch: Path, keep) -> list[dict]:
    """Returns the rows of a shape and mode, measured in new worker processes; keep(rows) after each case."""
    holders, workers = _load(_entries(args, mode), layer, args, scratch)
    rows: list[dict] = []
    try:
        for tokens in args.tokens or (QUICK_TOKENS if args.quick else TOKENS):
            case = _case(layer, mode, tokens, holders, args, calibration, scratch)
            keep(case)
            rows += case
    finally:
        for worker in workers:
            worker.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    calibration = Calibration(args.threads)
    machine = results.machine_record(calibration)
    report.print_machine(machine)
    machine["parity"] = _parity_remark(args.isa)
    print(machine["parity"])

    def keep(case: list[dict]) -> None:
        if args.save:
            results.save("peers", machine, args.isa, case, row_key)

    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for size in args.shape:
            Layer(size, args.seed).write(scratch / _LAYER, args.rank)
            layer = Layer.read(scratch / _LAYER, seed=args.seed)
            for mode in args.mode:
                rows += _mode_rows(layer, mode, args, calibration, scratch, keep)
    report.print_contest(rows)
    if args.save:
        print(f"saved {results.result_file('peers', machine, args.isa)}")
    decisive = [row for row in rows if row["contestant"] == "ktops" or row["status"] == "wrong"]
    return results.exit_status(decisive)


if __name__ == "__main__":
    sys.exit(main())
