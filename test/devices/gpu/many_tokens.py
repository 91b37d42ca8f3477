"""Experts that are copied to the device for many tokens: results, and from how many they are faster."""

from collections.abc import Iterator

import torch
from gpu.checks import Row, check
from gpu.inputs import layer, on_device, small
from gpu.runtime import Runtime

import ktops
from ktops.testing.budgets import forward_budget, relative_error

FORMATS = ("int4", "fp8_e4m3", "mxfp4", "q8_0")
MEASURED_FORMATS = (None, "int4")


def in_format(given: dict, name: str | None) -> dict:
    """Returns the arguments with their weights in a format; None leaves them dense."""
    weights = ("gate_up_proj", "down_proj") if name else ()
    return given | {weight: ktops.quantize(given[weight], name) for weight in weights}


@check("many tokens: within the budget of the operator", "tensors")
@torch.no_grad()
def within_the_budget(runtime: Runtime) -> None:
    cases = [(dtype, None) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for dtype, name in (*cases, *((torch.bfloat16, name) for name in FORMATS)):
        given = in_format(small(T=65, H=256, I=256, dtype=dtype, lora_rank=4, bias=True), name)
        expected = ktops.moe_sft(**given, compute="bf16")
        actual = ktops.moe_sft(**on_device(given, runtime.device), stream_min_tokens=1)
        assert actual.device == runtime.device
        error = relative_error(actual.cpu(), expected)
        assert error <= 2 * forward_budget(dtype), f"{dtype}, {name}: relative error {error:.1e}"


@check("many tokens: where copying the experts is faster", "tensors")
@torch.no_grad()
def crossover(runtime: Runtime) -> Iterator[Row]:
    for name in MEASURED_FORMATS:
        weights = in_format(layer(runtime, 1), name)
        faster = []
        for count in runtime.sizes.many_tokens:
            given = weights | {k: v for k, v in layer(runtime, count).items() if not k.endswith("proj")}
            moved = on_device(given, runtime.device)
            host = runtime.seconds(lambda moved=moved: runtime.moe_sft(**moved))
            copied = runtime.seconds(lambda moved=moved: ktops.moe_sft(**moved, stream_min_tokens=1))
            faster += [count] * (copied < host)
            yield {
                "weights": name or "bfloat16", "T": count, "on the CPU, ms": 1e3 * host,
                "copied, ms": 1e3 * copied,
            }  # fmt: skip
        yield {
            "weights": name or "bfloat16",
            "faster on the device from T": min(faster, default="more than were measured"),
        }
