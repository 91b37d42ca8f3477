"""Measures the overhead of a call: one token, a tiny layer, one thread, no gradient.

    python -m bench.overhead

The figure is the thread's CPU time of a call, from Python to the kernels and back, the best of many series.
"ktops.moe_sft" is the public function under torch.no_grad; "torch.ops.kt.moe_fwd" is the operator that it
calls, in torch.inference_mode (under torch.no_grad PyTorch first runs the operator's autograd, in Python).
"ktops.nn.KTExperts" is the module, which calls "torch.ops.kt.moe_fwd_prepared" with the tokens only.
The steps are those of ktops.profile. For comparison, the table also has F.linear, an operator without
arguments, and the same layer built from PyTorch's operators, which slows down with the machine as ktops does.

Exit status: 1 if ktops.moe_sft takes longer than --limit times the layer built from PyTorch's operators.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import ktops
from bench.arguments import Parser
from bench.machine import cpu_model
from bench.shapes import Shape
from ktops.nn import KTExperts
from ktops.ops.arguments import MoeArguments
from ktops.testing.inputs import op_arguments

LIMIT = 0.75
"""Limit relative to the same layer built from PyTorch's operators; 0.3 was measured on a Zen 4."""

_SERIES = 20
_SHAPE = Shape("tiny", hidden_size=16, intermediate_size=16, num_experts=4, top_k=2)


def best_seconds(function: Callable[[], object], calls: int = 500) -> float:
    """Returns the CPU seconds of this thread per call, in the fastest of several series of calls."""
    seconds = []
    for _ in range(_SERIES):
        start = time.thread_time()
        for _ in range(calls):
            function()
        seconds.append((time.thread_time() - start) / calls)
    return min(seconds)


def tiny_call(dtype: torch.dtype = torch.bfloat16) -> tuple[Callable[[], torch.Tensor], MoeArguments]:
    """Returns (ktops.moe_sft of one token, the arguments of torch.ops.kt.moe_fwd)."""
    h, i, e, k = _SHAPE.hidden_size, _SHAPE.intermediate_size, _SHAPE.num_experts, _SHAPE.top_k
    x, gate_up, down = (torch.ones(size, dtype=dtype) for size in ((1, h), (e, 2 * i, h), (e, h, i)))
    ids, weights = torch.arange(k).view(1, k), torch.full((1, k), 1 / k, dtype=dtype)
    inputs = {"hidden_states": x, "topk_ids": ids, "topk_weights": weights}
    inputs |= {"gate_up_proj": gate_up, "down_proj": down}
    return lambda: ktops.moe_sft(x, ids, weights, gate_up, down), op_arguments(inputs)


def layer_of_operators(a: MoeArguments) -> torch.Tensor:
    """Computes ktops.moe_sft of one token with PyTorch's operators."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    y = torch.zeros_like(a.hidden_states)
    for route, expert in enumerate(a.topk_ids[0].tolist()):
        gate, up = linear(a.hidden_states, a.gate_up_proj[expert]).chunk(2, dim=-1)
        y += linear(silu(gate) * up, a.down_proj[expert]) * a.topk_weights[:, route : route + 1]
    return y


def overheads() -> dict[str, float]:
    """Returns seconds per call, by name; the steps of the operator last, indented."""
    function, arguments = tiny_call()
    op = torch.ops.kt.moe_fwd.default
    x = arguments.hidden_states
    weights = (nn.Parameter(weight, False) for weight in (arguments.gate_up_proj, arguments.down_proj))
    experts = KTExperts.from_parameters(*weights).eval()
    rows = {}
    with torch.no_grad():
        rows["ktops.moe_sft"] = best_seconds(function)
        rows["the layer of PyTorch's operators"] = best_seconds(lambda: layer_of_operators(arguments))
        rows["torch.nn.functional.linear"] = best_seconds(lambda: torch.nn.functional.linear(x, x))
        rows["an operator without arguments"] = best_seconds(torch.ops.kt.profiling)
    with torch.inference_mode():
        rows["torch.ops.kt.moe_fwd"] = best_seconds(lambda: op(*arguments))
        tokens = arguments[:3]
        rows["ktops.nn.KTExperts"] = best_seconds(lambda: experts(*tokens))
        prepared = torch.ops.kt.prepare_moe(*arguments)
        short_op = torch.ops.kt.moe_fwd_prepared.default
        rows["torch.ops.kt.moe_fwd_prepared"] = best_seconds(lambda: short_op(*tokens, prepared))
        torch.ops.kt.release_moe(prepared)
    profiles = []
    for _ in range(_SERIES):
        with torch.inference_mode(), ktops.profile() as profile:
            for _ in range(200):
                op(*arguments)
        profiles.append({step.name: step.wall / step.calls for step in profile.steps})
    return rows | {f"  {name}": min(profile[name] for profile in profiles) for name in profiles[0]}


def main(argv: list[str] | None = None) -> int:
    parser = Parser("overhead", __doc__)
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="RATIO", help="default: %(default)s")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = overheads()
    finally:
        torch.set_num_threads(threads)
    print(f"{cpu_model()}, {ktops.cpu_capability()}; {_SHAPE}, one token, bfloat16")
    for name, seconds in rows.items():
        print(f"{name:32} {seconds * 1e6:7.2f} us")
    ratio = rows["ktops.moe_sft"] / rows["the layer of PyTorch's operators"]
    print(f"ktops.moe_sft takes {ratio:.2f} times the layer of PyTorch's operators; limit {args.limit:g}")
    return 1 if ratio > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
