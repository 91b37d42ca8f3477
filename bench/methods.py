"""Compares ktops with kt-kernel's method of the same name, taking turns on weights in the same format.

    python -m bench.methods --peer kt-kernel=VENV/bin/python --isa amx_bf16 --save
    python -m bench.methods --peer kt-kernel=VENV/bin/python --methods AMXINT8 RAWINT4 --tokens 1 16

Inference methods run forward, SFT methods forward and backward with LoRA. Both contestants get the same
codes, quantized from the layer's bfloat16 weights, except for kt-kernel methods that quantize weights
themselves. Each method has its own pair of worker processes. Before a result is timed, it is compared with
ktops.reference on the decoded codes, or on the bfloat16 weights if kt-kernel made its own codes. The figures
are milliseconds of the median call, ktops / kt-kernel, and in brackets the speedup of ktops, the median over
rounds. A method that kt-kernel cannot run is listed with the reason. Use a quiet machine: kt-kernel's threads
spin, so other load slows it down far more than ktops.

Exit status: 0, or 1 if a result of ktops was wrong, or 3 if it never had a quiet sample.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import ktops
from bench import report, results
from bench.arguments import OPS, Parser, positive
from bench.contest import ContestError, Entrant, Turns, Worker, contest, inputs_around, say
from bench.layer import Layer, Variant
from bench.machine import Calibration
from bench.peers.__main__ import PEER_BUDGETS, environment, parity
from ktops import ExpertWeight
from ktops.testing.budgets import forward_budget
from ktops.testing.weights import GROUPED, random_weight

PAGE = results.ROOT / "docs" / "formats.md"
TOKENS = (1, 16, 128, 2048)
OURS, THEIRS = "ktops", "kt-kernel"
MODULES = {OURS: "ktops_method", THEIRS: "kt_kernel_method"}
SECONDS = 0.3  # per sample
DISTINCT = 16  # experts with distinct weights
_LAYER, _CODES = "layer.pt", "codes.pt"

INTEGERS = (*GROUPED, "mxfp4", "q8_0", "q4_k", "q5_k", "q6_k")
"""Formats whose codes ktops may multiply as integers."""

ROUNDED_ACTIVATIONS = 0.05
"""Allowed error of integer products: activations are rounded to 127 steps of the largest in a row."""

OWN_CODES = {"bf16": PEER_BUDGETS * forward_budget(torch.bfloat16), "int8": 0.08, "int4": 0.5, "uint4": 0.5}
"""Allowed error of kt-kernel's own codes relative to bfloat16 weights. They cost 0.013 and 0.23 in
docs/formats.md, a row may be twice as bad, and gradients and transposed weights are rounded too. A wrong
expert
exceeds 1."""


@dataclass(frozen=True)
class Method:
    """A method name of KTMoEWrapper, the format, and whether kt-kernel starts from bfloat16 weights."""

    name: str
    format: str
    group_size: int = 0
    quantizes: bool = False

    @property
    def mode(self) -> str:
        return "training" if "SFT" in self.name else "forward"

    @property
    def weights(self) -> str:
        """The format, with the group size if it is not the usual one."""
        return f"{self.format}:{self.group_size}" if self.group_size else self.format


METHODS = (
    Method("BF16", "bf16"),
    Method("AMXINT8", "int8", quantizes=True),
    Method("MOE_INT8", "int8", quantizes=True),
    Method("AMXINT4", "int4", quantizes=True),
    Method("MOE_INT4", "int4", quantizes=True),
    Method("RAWINT4", "int4", 32),
    Method("GPTQ_INT4", "int4", 128),
    Method("FP8", "fp8_e4m3", 128),
    Method("FP8_PERCHANNEL", "fp8_e4m3"),
    Method("MXFP4", "mxfp4", 32),
    Method("MXFP8", "mxfp8", 32),
    Method("LLAMAFILE", "q4_k"),
    Method("LLAMAFILE", "q6_k"),
    Method("LLAMAFILE", "q8_0"),
    Method("AMXBF16_SFT", "bf16", quantizes=True),
    Method("AMXINT8_SFT", "int8", quantizes=True),
    Method("AMXINT4_SFT", "int4", quantizes=True),
    Method("AMXINT4_1_SFT", "uint4", quantizes=True),
    Method("AMXINT4_KGroup_SFT", "int4", 32),
    Method("AMXINT4_1KGroup_SFT", "uint4", 128, quantizes=True),
    Method("RAWINT4_SFT", "int4", 32),
    Method("AMXFP8_SFT", "fp8_e4m3", 128),
    Method("MXFP4_SFT", "mxfp4", 32),
)
"""INT8_SFT is left out because it is the class of AMXINT8_SFT under another name."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("methods", __doc__)
    names = list(dict.fromkeys(method.name for method in METHODS))
    parser.shape()
    parser.tokens(*TOKENS)
    parser.isa()
    parser.add_argument("--peer", type=environment, required=True, metavar="kt-kernel=PYTHON",
                        help="interpreter of its environment")  # fmt: skip
    parser.add_argument("--methods", choices=names, nargs="+", default=names, metavar="NAME",
                        help=f"any of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--rank", type=positive, default=8, metavar="R",
                        help="LoRA rank; RAWINT4_SFT supports only 8 (default: %(default)s)")  # fmt: skip
    parser.threads()
    parser.rounds(3)
    parser.max_load()
    parser.seed()
    parser.add_argument("--save", action="store_true", help="write to bench/results and docs/formats.md")
    return parser.parse_args(argv)


def stored(weight: ExpertWeight) -> dict:
    """Returns what the contestants read, the arguments of ExpertWeight."""
    sizes = {"shape": tuple(weight.shape), "group_size": weight.group_size}
    return {"format": weight.format, **sizes, **weight.codes._asdict()}


def quantized(layer: Layer, method: Method, file: Path) -> Layer:
    """Writes the layer's codes to a file; returns the layer with the decoded weights.

    To save time, only a few experts are quantized and repeated; values do not matter.
    """
    decoded = copy.copy(layer)
    codes = {}
    chosen = torch.arange(layer.shape.num_experts) % DISTINCT
    for name in ("gate_up", "down"):
        dense = getattr(layer, f"{name}_proj")
        few = random_weight(dense[:DISTINCT], method.format, method.group_size)
        tensors = few.codes.map(lambda tensor: tensor[chosen])
        weight = ExpertWeight(few.format, dense.shape, *tensors, group_size=few.group_size)
        codes[name] = stored(weight)
        setattr(decoded, f"{name}_proj", weight.dequantize(torch.bfloat16))
    torch.save(codes, file)
    return decoded


def allowed(method: Method, contestant: str) -> float:
    """Returns the relative error that is accepted."""
    if contestant == THEIRS and method.quantizes:
        return OWN_CODES[method.format]
    integers = method.format in INTEGERS
    if contestant == OURS:
        integers = integers and method.mode == "forward"
    elif method.name == "LLAMAFILE":
        integers = True
    return ROUNDED_ACTIVATIONS if integers else PEER_BUDGETS * forward_budget(torch.bfloat16)


def _start(name: str, args: argparse.Namespace, scratch: Path) -> Worker:
    variables, log = {"OMP_NUM_THREADS": str(args.threads)}, scratch / f"{name}.log"
    if name == OURS:
        folder = Path(ktops.__file__).parents[1]
        return Worker(sys.executable, {**variables, "KTOPS_ISA": args.isa}, log, folder)
    return Worker(args.peer[1], {**variables, **parity(args.isa)}, log)


def _entrants(method: Method, args: argparse.Namespace, scratch: Path) -> list[Entrant]:
    """Returns both contestants with the layer and its codes; failures are recorded."""
    entrants = []
    for name, module in MODULES.items():
        entrant = Entrant(name, _start(name, args, scratch))
        entrants.append(entrant)
        options = {"method": method.name, "file": str(scratch / _CODES)}
        entries = {name: {"module": module, "options": options}}
        try:
            reply = entrant.worker.ask(
                "load", file=str(scratch / _LAYER), rank=args.rank, threads=args.threads, contestants=entries
            )
            entrant.failure = reply["unavailable"][name]
        except ContestError as error:
            entrant.failure = str(error)
    return entrants


def ratios(ours: Entrant, theirs: Entrant) -> list[float]:
    """Returns kt-kernel's time divided by that of ktops for each round that both have."""
    rounds = ours.samples.keys() & theirs.samples.keys()
    median = statistics.median
    return [median(theirs.samples[number]) / median(ours.samples[number]) for number in sorted(rounds)]


def row_of(case: dict, ours: Entrant, theirs: Entrant) -> dict:
    """Returns the row of a method and a number of tokens; "status" is that of ktops, "peer" kt-kernel's."""
    row = case | {"status": ours.status, "peer": theirs.status}
    if ours.failure or theirs.failure:
        row["message"] = ours.failure or theirs.failure
    for name, entrant in (("ktops", ours), ("kt_kernel", theirs)):
        if entrant.seconds is not None:
            row |= {f"{name}_seconds": entrant.seconds, f"{name}_error": entrant.error}
    if ours.seconds is not None and theirs.seconds is not None:
        found = ratios(ours, theirs) or [theirs.seconds / ours.seconds]
        speeds = {"speed": statistics.median(found), "speed_min": min(found), "speed_max": max(found)}
        row |= speeds | {"rounds": len(found)}
    return row


def method_rows(method: Method, layer: Layer, args: argparse.Namespace, scratch: Path) -> list[dict]:
    """Returns the rows of a method, measured in a pair of processes that then ends."""
    decoded = quantized(layer, method, scratch / _CODES)
    op, variant = OPS[method.mode], Variant(args.rank if method.mode == "training" else 0)
    budget = forward_budget(torch.bfloat16)

    def check(entrant: Entrant, inputs, result) -> float:
        own = entrant.name == THEIRS and method.quantizes
        factor = allowed(method, entrant.name) / budget
        return op.check(layer if own else decoded, variant, inputs, result, factor)

    entrants = _entrants(method, args, scratch)
    case = {"method": method.name, "format": method.weights, "mode": method.mode, "lora_rank": variant.rank}
    case |= {"shape": layer.shape.name, "isa": args.isa}
    rows = []
    try:
        for tokens in args.tokens:
            able = [Entrant(entrant.name, entrant.worker, failure=entrant.failure) for entrant in entrants]
            running = [entrant for entrant in able if not entrant.failure]
            turns = Turns(args.rounds, SECONDS, args.max_load, 3 * args.rounds)
            contest(running, method.mode, inputs_around(layer, tokens), check, turns, scratch)
            rows.append(row_of(case | {"tokens": tokens}, *able))
            say(f"{method.name:20} {method.weights:12} T={tokens:<5} {words(rows[-1])}")
    finally:
        for entrant in entrants:
            entrant.worker.close()
    return rows


def words(row: dict) -> str:
    """Returns the figure of a row, or why there is none."""
    if "speed" in row:
        return cell(row)
    reason = row.get("message", "no quiet sample").split(". Supported")[0]
    return f"ktops {row['status']}, kt-kernel {row['peer']}: {reason}"


def cell(row: dict) -> str:
    """Returns "milliseconds of ktops / of kt-kernel (speedup of ktops)"."""
    if "speed" not in row:
        return "-"
    return f"{1e3 * row['ktops_seconds']:.3g} / {1e3 * row['kt_kernel_seconds']:.3g} ({row['speed']:.2f})"


def table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (head, lines), a line per method that kt-kernel runs."""
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["format"]), {})[row["tokens"]] = cell(row)
    order = [(m.name, m.weights) for m in METHODS if set(lines.get((m.name, m.weights), {}).values()) - {"-"}]
    found = [(*name, *(lines[name].get(t, "-") for t in tokens)) for name in order]
    return ("method", "format", *(f"T={t}" for t in tokens)), found


def missing(rows: list[dict]) -> dict[str, str]:
    """Returns {method: why there is no figure}."""
    return {row["method"]: words(row) for row in rows if "speed" not in row}


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("shape", "mode", "method", "format", "tokens"))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    machine = results.machine_record(Calibration(args.threads))
    report.print_machine(machine)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        Layer(args.shape, args.seed).write(scratch / _LAYER, args.rank)
        layer = Layer.read(scratch / _LAYER, seed=args.seed)
        for method in (method for method in METHODS if method.name in args.methods):
            rows += method_rows(method, layer, args, scratch)
            if args.save:
                results.save("methods", machine, args.isa, rows, row_key)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        report.print_columns(*table([row for row in rows if row["mode"] == mode]))
    for name, reason in missing(rows).items():
        print(f"{name}: {reason}")
    if args.save:
        from bench.plots import fill

        PAGE.write_text(fill(PAGE.read_text(), f"methods {args.isa}", section(args.isa)))
    return results.exit_status(rows)


def section(isa: str) -> str:
    """Returns the block of docs/formats.md for the kernels of an ISA, with tables per saved machine."""
    return "\n".join(map(machine_section, results.load("methods", isa=isa))) or "Not measured yet.\n"


def machine_section(record: dict) -> str:
    from bench.plots import markdown

    machine, rows = record["machine"], record["rows"]
    revisions = ", ".join(sorted({row["revision"] for row in rows}))
    text = f"{machine['cpu']}, {machine['threads']} threads, {record['isa']} kernels, revision {revisions}.\n"
    for mode in OPS:
        if any(row["mode"] == mode for row in rows):
            text += f"\n{mode.capitalize()}:\n\n{markdown(*table([r for r in rows if r['mode'] == mode]))}"
    reasons = "".join(f"* `{name}`: {reason}\n" for name, reason in missing(rows).items())
    return text + (f"\nWithout a figure:\n\n{reasons}" if reasons else "")


if __name__ == "__main__":
    sys.exit(main())
