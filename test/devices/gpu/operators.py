"""The operators with tokens on the device: the results of the CPU, bit for bit, and what moves."""

from collections.abc import Iterator

import torch
from gpu.checks import Row, check
from gpu.inputs import on_device, small
from gpu.runtime import Runtime
from torch._dynamo.utils import counters

import ktops
from ktops.formats import names
from ktops.ops.check_devices import LORA
from ktops.testing import compare
from ktops.testing.inputs import floating, require_grad

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FROM_DEVICE = ("output", "hidden_states", "topk_weights")
COUNTED = ("down", "up", "copies_down", "copies_up")


def require_equal(runtime: Runtime, given: dict, *moved: str) -> None:
    """Requires the output and all gradients of the CPU, each on the device of its tensor."""
    grad_output = compare.random_grad_output(given)
    expected = compare.run(given, grad_output)
    actual = compare.run(on_device(given, runtime.device, *moved), grad_output.to(runtime.device))
    for name, value in expected.items():
        device = runtime.device.type if name in (*FROM_DEVICE, *moved) else "cpu"
        assert actual[name].device.type == device, f"{name} is on {actual[name].device}"
        assert torch.equal(actual[name].cpu(), value), name
    with torch.no_grad():
        output = runtime.moe_sft(**on_device(given, runtime.device))
    assert torch.equal(output.cpu(), ktops.moe_sft(**given)), "forward without gradients"


@check("operators: every dtype, forward and backward", "tensors")
def every_dtype(runtime: Runtime) -> None:
    options = {"lora_rank": (3, 5), "bias": True, "invalid_ids": True}
    for dtype in DTYPES:
        for num_tokens in (0, 1, 33):
            require_equal(runtime, small(T=num_tokens, dtype=dtype, **options))
    require_equal(runtime, small(ids_dtype=torch.int32, weights_dtype=torch.bfloat16, **options))


@check("operators: LoRA factors on the device", "tensors")
def factors_on_the_device(runtime: Runtime) -> None:
    require_equal(runtime, small(lora_rank=4), *LORA)
    require_equal(runtime, small(lora_rank=4), *LORA[::3])


@check("operators: weights in every format", "tensors")
def every_format(runtime: Runtime) -> None:
    for name in names(written=True):
        given = small(dtype=torch.bfloat16, lora_rank=4, H=256, I=256)
        for weight in ("gate_up_proj", "down_proj"):
            given[weight] = ktops.quantize(given[weight], name)
        require_equal(runtime, given)


@check("operators: torch.compile, with CUDA graphs where they are possible", "tensors")
def compiled(runtime: Runtime) -> Iterator[Row]:
    before = counters["inductor"]["cudagraph_skips"]
    function = runtime.compile(lambda x, **rest: 2 * ktops.moe_sft(x.abs(), **rest))
    for seed in range(4):
        given = small(dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            expected = 2 * ktops.moe_sft(**given | {"hidden_states": given["hidden_states"].abs()})
            moved = on_device(given, runtime.device)
            actual = function(moved.pop("hidden_states"), **moved).cpu()
        assert torch.equal(actual, expected), f"call {seed}"
    given = require_grad(on_device(small(lora_rank=4), runtime.device), *LORA)
    runtime.compile(lambda given: ktops.moe_sft(**given))(given).sum().backward()
    assert all(given[name].grad.isfinite().all() for name in LORA)
    skipped = counters["inductor"]["cudagraph_skips"] - before
    yield {"torch.compile": 'mode="reduce-overhead"', "graphs skipped": skipped}


@check("traffic: one copy each way", "tensors", "traffic")
def traffic(runtime: Runtime) -> Iterator[Row]:
    given = small(dtype=torch.bfloat16, lora_rank=4)
    moved = on_device(given, runtime.device)
    tokens = given["hidden_states"].nbytes
    ids, weights = (given[name].nbytes for name in ("topk_ids", "topk_weights"))
    grad_output = compare.random_grad_output(given).to(runtime.device)
    with torch.no_grad():
        runtime.moe_sft(**moved)  # the first call pins memory
        with runtime.traffic() as inference:
            runtime.moe_sft(**moved)
    moved = require_grad(moved, *floating(moved))
    with runtime.traffic() as forward:
        output = ktops.moe_sft(**moved)
    with runtime.traffic() as backward:
        output.backward(grad_output)
    once = tokens + ids + weights, tokens, 3, 1
    expected = {"inference": once, "forward": once, "backward": (tokens, tokens + weights, 1, 2)}
    for (name, wanted), counted in zip(expected.items(), (inference, forward, backward), strict=True):
        found = tuple(counted[key] for key in COUNTED)
        assert found == wanted, f"{name}: {COUNTED} are {found}, expected {wanted}"
        pageable = counted["pageable_down"] + counted["pageable_up"]
        assert not pageable, f"{name}: {pageable} copies from or to memory that is not pinned"
        yield {"[33, 64] bfloat16, K=2": name, "bytes down": found[0], "bytes up": found[1]}
