"""Measures the peak memory of one forward and backward, beyond weights, inputs and outputs.

    python -m bench.memory
    python -m bench.memory --shape dsv2_lite --tokens 512 2048 --save recompute

extra: the highest resident memory of the process during the call, minus what was resident before and minus
the results (output and gradients). saved: what forward must keep for backward. scratch: the peak that
ktops.memory_stats counted. The call finds no scratch memory from earlier calls. All in MiB, bfloat16.

Exit status: 1 if extra exceeds saved by more than --limit.
"""

import argparse
import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ktops
from bench.arguments import Parser, lora_rank
from bench.layer import Inputs, Layer
from bench.machine import cpu_model
from bench.shapes import Shape

MIB = 1 << 20


def resident_bytes(peak: bool = False) -> int:
    """Returns the resident memory of this process now, or the highest since :func:`reset_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def reset_peak() -> None:
    """Resets the peak of resident memory to its current value."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Usage:
    """Bytes used by one forward and backward; scratch is the peak that ktops.memory_stats counted."""

    extra: int
    saved: int
    scratch: int


def saved_bytes(shape: Shape, tokens: int, rank: int, save: str) -> int:
    """Returns the bytes of [g | u] (unless save is "recompute") and of the r-wide products of each route."""
    gate_up = 0 if save == "recompute" else 2 * shape.intermediate_size
    return 2 * tokens * shape.top_k * (gate_up + 2 * rank)


def call(layer: Layer, inputs: Inputs, rank: int, save: str) -> list[Tensor]:
    """Returns the output and the gradients of one forward and backward."""
    adapters = layer.adapters(rank)
    leaves = {
        "hidden_states": inputs.hidden_states.requires_grad_(),
        "topk_weights": inputs.topk_weights.requires_grad_(),
    }
    output = ktops.moe_sft(
        leaves["hidden_states"],
        inputs.topk_ids,
        leaves["topk_weights"],
        layer.gate_up_proj,
        layer.down_proj,
        **adapters,
        save=save,
    )
    grads = torch.autograd.grad(output, [*leaves.values(), *adapters.values()], inputs.grad_output)
    return [output, *grads]


def _added(layer: Layer, tokens: int, rank: int, save: str) -> int:
    """Returns the resident bytes that one forward and backward add at their peak, minus their results."""
    inputs = layer.inputs(tokens)
    layer.adapters(rank)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed but still resident memory would hide what the call adds
    before = resident_bytes()
    reset_peak()
    results = call(layer, inputs, rank, save)
    return resident_bytes(peak=True) - before - sum(tensor.nbytes for tensor in results)


def measure(layer: Layer, tokens: int, rank: int, save: str = "activations") -> Usage:
    """Measures one call after a small one that loads code and starts threads."""
    _added(layer, 1, rank, save)
    ktops.empty_cache()
    extra = _added(layer, tokens, rank, save)
    scratch = ktops.memory_stats()["bytes_peak"]
    return Usage(extra, saved_bytes(layer.shape, tokens, rank, save), scratch)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("memory", __doc__)
    add = parser.add_argument
    parser.shape()
    parser.tokens(2048)
    add("--rank", type=lora_rank, default=16, metavar="R", help="LoRA rank (default: %(default)s)")
    add("--save", choices=("activations", "recompute"), default="activations")
    parser.isa(several=True)
    parser.threads()
    add("--limit", type=float, default=64, metavar="MIB", help="allowed scratch (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    layer = Layer(args.shape, seed=0)
    weights = layer.gate_up_proj.nbytes + layer.down_proj.nbytes
    print(f"{cpu_model()}, {args.threads} threads; {args.shape.name}, LoRA r={args.rank}, save={args.save!r}")
    print(f"weights {weights / MIB:.1f} MiB, in place; MiB beyond weights, inputs, output and gradients:")
    print(f"{'isa':12} {'T':>6} {'extra':>8} {'saved':>8} {'extra-saved':>12} {'scratch':>8}")
    exceeded = False
    for isa in args.isa:
        for tokens in args.tokens:
            with ktops.use_isa(isa):
                usage = measure(layer, tokens, args.rank, args.save)
            over = (usage.extra - usage.saved) / MIB
            exceeded = exceeded or over > args.limit
            print(
                f"{isa:12} {tokens:6} {usage.extra / MIB:8.1f} {usage.saved / MIB:8.1f} {over:12.1f} "
                f"{usage.scratch / MIB:8.1f}"
            )
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
