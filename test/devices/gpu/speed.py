"""Times of copies and of a layer; whether the device computes while the CPU does."""

from collections.abc import Iterator

import torch
from gpu.checks import Row, check
from gpu.inputs import layer, on_device
from gpu.runtime import Runtime
from torch import Tensor

import ktops
from ktops.ops.check_devices import LORA
from ktops.testing.inputs import require_grad

SLOWDOWN = 1.25
"""How much longer a layer may take than the longer of its two parts and its copies; they share memory."""

MANY = 100
"""Products of which the time of one is taken, since launching a single one takes as long."""

LAUNCHES = 1e-4
"""Seconds that it may take besides, to launch kernels and host functions."""


def copy_seconds(runtime: Runtime, nbytes: int) -> tuple[float, float]:
    """Returns the times of a copy from the device to pinned memory, and back."""
    host = runtime.pinned(nbytes)
    device = host.to(runtime.device)
    down = runtime.seconds(lambda: host.copy_(device, non_blocking=True))
    return down, runtime.seconds(lambda: device.copy_(host, non_blocking=True))


@check("time: copies", "tensors")
def copies(runtime: Runtime) -> Iterator[Row]:
    hidden_size = runtime.sizes.layer["H"]
    tokens = {f"hidden_states, T={count}": 2 * hidden_size * count for count in runtime.sizes.tokens}
    for name, nbytes in (tokens | {"much": runtime.sizes.copied_bytes}).items():
        down, up = copy_seconds(runtime, nbytes)
        yield {
            "copy": name, "bytes": nbytes, "down, us": 1e6 * down, "up, us": 1e6 * up,
            "down, GB/s": nbytes / down / 1e9, "up, GB/s": nbytes / up / 1e9,
        }  # fmt: skip


@check("time: a layer with tokens on the CPU and on the device", "tensors")
def layers(runtime: Runtime) -> Iterator[Row]:
    for count in runtime.sizes.tokens:
        given = layer(runtime, count)
        moved = on_device(given, runtime.device)
        with torch.no_grad():
            host = runtime.seconds(lambda given=given: ktops.moe_sft(**given))
            device = runtime.seconds(lambda moved=moved: runtime.moe_sft(**moved))
        yield {"mode": "forward", "T": count, "CPU, ms": 1e3 * host, "device, ms": 1e3 * device}
        times = [runtime.seconds(training_step(one)) for one in (given, moved)]
        yield {"mode": "training", "T": count, "CPU, ms": 1e3 * times[0], "device, ms": 1e3 * times[1]}


def training_step(given: dict, rank: int = 16):
    """Returns a function that runs forward and backward with LoRA of this rank on both projections."""
    gate_up, down = given["gate_up_proj"], given["down_proj"]
    sizes = gate_up.shape[2], gate_up.shape[1], down.shape[2], down.shape[1]
    factors = {
        name: torch.full((len(down), *shape), 0.01)
        for name, shape in zip(
            LORA, ((rank, sizes[0]), (sizes[1], rank), (rank, sizes[2]), (sizes[3], rank)), strict=True
        )
    }
    given = require_grad(given | factors, "hidden_states", *LORA)
    return lambda: ktops.moe_sft(**given).sum().backward()


@check("overlap: shared experts on the device while the CPU computes the routed ones", "streams")
@torch.no_grad()
def overlap(runtime: Runtime) -> Iterator[Row]:
    """The order of DeepSeek: routed experts, then shared experts, then their sum."""
    for count in runtime.sizes.tokens:
        moved = on_device(layer(runtime, count), runtime.device)
        x = moved["hidden_states"]
        weight = torch.eye(x.shape[1], dtype=x.dtype, device="cpu").to(runtime.device)

        def shared(products: int, x: Tensor = x, weight: Tensor = weight) -> Tensor:
            for _ in range(products):
                x = x @ weight
            return x

        alone = runtime.seconds(lambda moved=moved: runtime.moe_sft(**moved))
        one_product = runtime.seconds(lambda shared=shared: shared(MANY)) / MANY
        products = max(1, round(alone / one_product))

        def layer_of_both(moved: dict = moved, shared=shared, products: int = products) -> Tensor:
            routed = runtime.begin(**moved)
            return shared(products) + routed

        device = runtime.seconds(lambda shared=shared, products=products: shared(products))
        both = runtime.seconds(layer_of_both)
        copied = sum(copy_seconds(runtime, x.nbytes))
        yield {
            "T": count, "routed experts, ms": 1e3 * alone, "shared experts, ms": 1e3 * device,
            "copies, ms": 1e3 * copied, "both, ms": 1e3 * both,
        }  # fmt: skip
        limit = SLOWDOWN * max(alone, device) + copied + LAUNCHES
        assert both <= limit, f"T={count}: {1e3 * both:.2f} ms, more than {1e3 * limit:.2f} ms"
