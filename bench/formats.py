"""Compares weight formats with bfloat16 weights and with the limits of this machine.

    python -m bench.formats --isa avx512_bf16 --save
    python -m bench.formats --formats int4:128 int4:128@int8 q4_k --tokens 1 16 --mode forward

A contestant is a format, optionally followed by a colon and a group size, and by an @ and the type to compute
in (bf16, int8; default: bf16). Contestants take turns, A B A B, in one process, with cold weights and fresh
inputs. A figure is the median time of a call. The roofline is max(flops / peak, bytes / bandwidth), with the
bytes of the format and the peak of the type computed in, measured in the same run. "speed" is relative to
dense bfloat16 weights. Each contestant is first compared with the op on its decoded weights.

Exit status: 0, or 1 if a result was wrong.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

import ktops
from bench import report, results
from bench.arguments import Parser
from bench.layer import Inputs, Layer
from bench.machine import Calibration
from bench.roofline import Limits, Work
from bench.shapes import Shape
from ktops import ExpertWeight
from ktops.formats import get_format
from ktops.testing.budgets import forward_budget, relative_error
from ktops.testing.weights import random_weight

PAGE = results.ROOT / "docs" / "formats.md"
FORMATS = (
    "int8", "int8@int8", "int4:0@int8", "int4:128", "int4:128@int8", "int4:32@int8", "uint4:128",
    "uint4:128@int8", "fp8_e4m3:128", "mxfp8", "mxfp4", "mxfp4@int8", "q8_0", "q8_0@int8", "q4_0",
    "q4_0@int8", "q4_k", "q4_k@int8", "q5_k", "q5_k@int8", "q6_k", "q6_k@int8", "iq4_xs", "iq4_xs@int8",
)  # fmt: skip
TOKENS = (1, 16, 2048)
ROUNDED_ACTIVATIONS = 0.03
"""Error of int8 products: three factors rounded to 127 steps of the largest of 32 normal numbers, 2 to 3."""


@dataclass
class Contestant:
    """A layer's weights in a format ("dense": bfloat16), and the seconds of its calls so far."""

    name: str
    compute: str
    gate_up: Tensor | ExpertWeight
    down: Tensor | ExpertWeight
    seconds: list[float] = field(default_factory=list)

    @property
    def bytes_an_expert(self) -> int:
        return (self.gate_up.nbytes + self.down.nbytes) // self.gate_up.shape[0]

    def run(self, inputs: Inputs, training: bool) -> Tensor:
        x = inputs.hidden_states.detach().requires_grad_(training)
        output = ktops.moe_sft(
            x, inputs.topk_ids, inputs.topk_weights, self.gate_up, self.down, compute=self.compute
        )
        if training:
            output.backward(inputs.grad_output)
        return output.detach()


def contestant(text: str, layer: Layer) -> Contestant:
    """Returns the layer in the format that text names. All experts are copies of one, to save time."""
    layout, _, compute = text.partition("@")
    name, _, group = layout.partition(":")
    size = int(group) if group else get_format(name).default_group_size

    def repeated(dense: Tensor) -> ExpertWeight:
        weight = random_weight(dense[:1], name, size)
        codes = weight.codes.map(lambda tensor: tensor.expand(len(dense), *tensor.shape[1:]).contiguous())
        return ExpertWeight(name, dense.shape, *codes, group_size=size)

    return Contestant(text, compute or "bf16", repeated(layer.gate_up_proj), repeated(layer.down_proj))


def first_experts(weight: Tensor | ExpertWeight, n: int) -> Tensor | ExpertWeight:
    if isinstance(weight, Tensor):
        return weight[:n]
    codes = weight.codes.map(lambda tensor: tensor[:n])
    return ExpertWeight(weight.format, (n, *weight.shape[1:]), *codes, group_size=weight.group_size)


def check(entrant: Contestant, layer: Layer) -> float:
    """Returns the error relative to the op on the decoded weights of a few experts."""
    inputs = layer.inputs(8)
    inputs.topk_ids.remainder_(4)
    gate_up, down = few = [first_experts(weight, 4) for weight in (entrant.gate_up, entrant.down)]
    actual = Contestant("", entrant.compute, gate_up, down).run(inputs, False)
    gate_up, down = (w if isinstance(w, Tensor) else w.dequantize(torch.bfloat16) for w in few)
    expected = Contestant("", "bf16", gate_up, down).run(inputs, False)
    return relative_error(actual, expected)


def allowed(entrant: Contestant) -> float:
    return ROUNDED_ACTIVATIONS if entrant.compute == "int8" else 2 * forward_budget(torch.bfloat16)


def measure(entrants: list[Contestant], layer: Layer, tokens: int, training: bool, rounds: int) -> int:
    """Fills the contestants' seconds; returns the number of experts that a call uses."""
    calls = max(1, min(8, layer.shape.num_experts // (tokens * layer.shape.top_k)))
    for entrant in entrants:
        entrant.seconds.clear()
    for turn in range(rounds + 1):
        for entrant in entrants if turn % 2 == 0 else entrants[::-1]:
            for inputs in [layer.inputs(tokens) for _ in range(calls)]:
                start = time.perf_counter()
                entrant.run(inputs, training)
                if turn:
                    entrant.seconds.append(time.perf_counter() - start)
    return inputs.topk_ids.unique().numel()


def work(shape: Shape, entrant: Contestant, tokens: int, experts: int, training: bool) -> Work:
    """Returns the work of forward, or of forward and the gradient of hidden_states.

    Weights are read once or twice, and activations are counted.
    """
    passes = 2 if training else 1
    activations = 2 * tokens * shape.hidden_size * 2 * passes
    flops = 2 * tokens * shape.top_k * shape.expert_elements * passes
    return Work(flops, experts * entrant.bytes_an_expert * passes + activations)


def rows_of(entrants, layer, isa, tokens, mode, rounds, calibration) -> list[dict]:
    training = mode == "training"
    experts = measure(entrants, layer, tokens, training, rounds)
    bandwidth = calibration.bandwidth()
    dense = statistics.median(entrants[0].seconds)
    rows = []
    for entrant in entrants:
        limits = Limits(calibration.peak(isa, "int8" if entrant.compute == "int8" else "bfloat16"), bandwidth)
        least = work(layer.shape, entrant, tokens, experts, training)
        seconds = statistics.median(entrant.seconds)
        rows.append(
            {
                "format": entrant.name, "isa": isa, "shape": layer.shape.name, "mode": mode, "tokens": tokens,
                "seconds": seconds, "fraction": least.seconds(limits) / seconds, "bound": least.bound(limits),
                "speed": dense / seconds, "revision": results.revision(), "status": "ok",
            }
        )  # fmt: skip
    return rows


def row_key(row: dict) -> tuple:
    """Returns what distinguishes the rows of one result file."""
    return tuple(row[name] for name in ("shape", "mode", "tokens", "format"))


def table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (head, lines), a line per format: fraction of the roofline and speed relative to bfloat16."""
    cases = list(dict.fromkeys((row["mode"], row["tokens"]) for row in rows))
    head = ("format", *(f"{mode} T={tokens}" for mode, tokens in cases))
    cells = {
        (row["format"], row["mode"], row["tokens"]): f"{row['fraction']:.2f} ({row['speed']:.2f})"
        for row in rows
    }
    names = dict.fromkeys(row["format"] for row in rows)
    return head, [(name, *(cells.get((name, *case), "-") for case in cases)) for name in names]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("formats", __doc__)
    parser.shape()
    parser.tokens(*TOKENS)
    parser.mode()
    parser.isa()
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="FORMAT", help="default: several")
    parser.rounds(5)
    parser.threads()
    parser.seed()
    parser.add_argument("--save", action="store_true", help="write to bench/results and docs/formats.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    calibration = Calibration(args.threads)
    machine = results.machine_record(calibration)
    report.print_machine(machine)
    layer = Layer(args.shape, args.seed)
    rows: list[dict] = []
    with ktops.use_isa(args.isa):
        dense = Contestant("dense bf16", "bf16", layer.gate_up_proj, layer.down_proj)
        entrants = [dense, *(contestant(text, layer) for text in args.formats)]
        errors = {entrant.name: check(entrant, layer) for entrant in entrants}
        wrong = [entrant for entrant in entrants if not errors[entrant.name] <= allowed(entrant)]
        for entrant in wrong:
            print(f"{entrant.name} is WRONG: relative error {errors[entrant.name]:.3g}")
        right = [entrant for entrant in entrants if entrant not in wrong]
        for mode in args.mode:
            for tokens in args.tokens:
                able = right if mode == "forward" else [e for e in right if e.compute == "bf16"]
                rows += rows_of(able, layer, args.isa, tokens, mode, args.rounds, calibration)
                for row in rows[-len(able) :]:
                    print(
                        f"{mode:8} T={tokens:<5} {row['format']:15} {1e3 * row['seconds']:9.2f} ms   "
                        f"{row['fraction']:.2f} of the roofline ({row['bound']})   speed {row['speed']:.2f}"
                    )
    if args.save:
        save(machine, rows, args.isa)
    return 1 if wrong else 0


def save(machine: dict, rows: list[dict], isa: str) -> None:
    from bench.plots import fill

    results.save_by_isa("formats", machine, rows, row_key)
    PAGE.write_text(fill(PAGE.read_text(), f"speed {isa}", section(isa)))


def section(isa: str) -> str:
    """Returns the block of docs/formats.md for the kernels of an ISA, with a table per saved machine."""
    from bench.plots import markdown

    tables = []
    for record in results.load("formats", isa=isa):
        machine, threads = record["machine"], str(record["machine"]["threads"])
        revisions = ", ".join(sorted({row["revision"] for row in record["rows"]}))
        bandwidth = machine["read_bytes_per_second"][threads] / 1e9
        origin = f"{machine['cpu']}, {threads} threads, {isa} kernels, revision {revisions}"
        tables.append(f"{origin}; {bandwidth:.1f} GB/s.\n\n{markdown(*table(record['rows']))}")
    return "\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())
