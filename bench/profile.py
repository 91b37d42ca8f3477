"""Times the steps of forward and backward of one layer, and compares each with its lower bound.

    python -m bench.profile --shape qwen3_30b --tokens 128
    python -m bench.profile --tokens 2048 --isa amx_bf16 avx512_bf16 --rank 0 --mode forward

busy: milliseconds in tasks, summed over threads. share: fraction of all busy time. wait: time waiting for
other threads' last tasks. wall: elapsed time. limit: the roofline of the step's own FLOPs and weights at the
peak and bandwidth measured before and after. fraction: limit / wall. blocks by path: how products with the
weights were computed (ktops_csrc/gemm/path.h). Figures are medians over the calls, with cold weights and
fresh inputs.
"""

import argparse
import statistics
import sys

import torch

import ktops
from bench.arguments import OPS, Parser, lora_rank, positive
from bench.layer import Layer, Variant
from bench.machine import Calibration, cpu_model
from bench.measure import mean_limits
from bench.roofline import Limits, Work
from bench.shapes import Shape


def step_work(shape: Shape, tokens: int, distinct_experts: int, rank: int) -> dict[tuple[str, str], Work]:
    """Returns the FLOPs and the bytes of bfloat16 weights and LoRA gradients, by (operator, step).

    The FLOPs add up to those of ``bench.roofline``. The bytes do not include activations.
    """
    h, i, r = shape.hidden_size, shape.intermediate_size, rank
    routes = tokens * shape.top_k

    def work(*elements: int, gradients: bool = False) -> Work:
        """Returns the work of multiplying each route by ``elements`` weights (or gradients), moved once."""
        n = sum(elements)
        return Work(2 * routes * n, 2 * distinct_experts * n if not gradients else 2 * shape.num_experts * n)

    forward = {
        "project_x": work(h * r),
        "gate_up": work(2 * i * h, 2 * i * r),
        "project_h": work(i * r),
        "down": work(i * h, h * r),
    }
    backward = {
        "project_d": work(h * r),
        "activate": work(i * h, i * r, i * r),
        "project_grad": work(2 * i * r),
        "combine_x": work(2 * i * h, h * r),
        "weights_h": work(h * r, h * r, gradients=True),
        "weights_i": work(2 * i * r, gradients=True),
    }
    by_op = {"moe_fwd": forward, "moe_sft_fwd": forward, "moe_sft_bwd": backward}
    return {(op, step): w for op, steps in by_op.items() for step, w in steps.items()}


def profile_calls(mode: str, layer: Layer, tokens: int, rank: int, calls: int) -> tuple[list, int]:
    """Returns ([median Step of each step], distinct experts of the last call)."""
    op = OPS[mode]
    op.call(layer, Variant(rank), layer.inputs(tokens))
    profiles = []
    for _ in range(calls):
        inputs = layer.inputs(tokens)
        with ktops.profile() as profile:
            op.call(layer, Variant(rank), inputs)
        profiles.append({(step.op, step.name): step for step in profile.steps})
    medians = []
    for op_name, name in profiles[0]:
        samples = [profile[op_name, name] for profile in profiles if (op_name, name) in profile]
        busy, wait, wall = (
            statistics.median(getattr(s, what) for s in samples) for what in ("busy", "wait", "wall")
        )
        medians.append(ktops.Step(op_name, name, 1, samples[0].tasks, busy, wait, wall, samples[0].paths))
    return medians, inputs.distinct_experts


def print_steps(steps: list, work: dict[tuple[str, str], Work], limits: Limits) -> None:
    """Prints one line per step, and their sum."""
    busy = sum(step.busy for step in steps)
    head = (
        f"{'operator':12} {'step':18} {'tasks':>7} {'busy ms':>10} {'share':>6} "
        f"{'wait ms':>9} {'wall ms':>10} {'GFLOP/s':>8} {'limit ms':>9} {'fraction':>8}"
    )
    print(head + "  blocks by path")
    for step in steps:
        line = (
            f"{step.op:12} {step.name:18} {step.tasks:7} {step.busy * 1e3:10.3f} {step.busy / busy:6.1%} "
            f"{step.wait * 1e3:9.3f} {step.wall * 1e3:10.3f}"
        )
        if w := work.get((step.op, step.name)):
            limit = w.seconds(limits)
            line += f" {w.flops / step.wall / 1e9:8.1f} {limit * 1e3:9.3f} {limit / step.wall:8.3f}"
        print(f"{line:{len(head)}}  {step.taken}".rstrip())
    wall, wait = (sum(getattr(step, what) for step in steps) for what in ("wall", "wait"))
    print(f"{'':12} {'sum':18} {'':7} {busy * 1e3:10.3f} {1:6.1%} {wait * 1e3:9.3f} {wall * 1e3:10.3f}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("profile", __doc__)
    add = parser.add_argument
    parser.shape()
    parser.tokens(128)
    add("--mode", choices=list(OPS), default="training", help="default: %(default)s")
    add("--rank", type=lora_rank, default=16, metavar="R", help="LoRA rank (default: %(default)s)")
    parser.isa(several=True)
    parser.threads()
    add("--calls", type=positive, default=5, help="default: %(default)s")
    parser.seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    calibration = Calibration(args.threads)
    layer = Layer(args.shape, args.seed)
    print(f"{cpu_model()}, {args.threads} threads, {args.shape.name}, {args.mode}, LoRA r={args.rank}")
    for tokens in args.tokens:
        for isa in args.isa:
            with ktops.use_isa(isa):
                before = calibration.limits(isa, "bfloat16")
                steps, experts = profile_calls(args.mode, layer, tokens, args.rank, args.calls)
                limits = mean_limits(before, calibration.limits(isa, "bfloat16"))
            print(
                f"\nT={tokens} {isa}: {limits.peak / 1e9:.1f} GFLOP/s, {limits.bandwidth / 1e9:.1f} GB/s, "
                f"{experts} experts with tokens"
            )
            print_steps(steps, step_work(args.shape, tokens, experts, args.rank), limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
