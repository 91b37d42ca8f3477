"""Calls in the order of a stream: Python goes on, CUDA graphs, pinned memory, errors, KTMoEWrapper."""

from collections.abc import Iterator

import torch
from gpu.checks import Row, check
from gpu.inputs import TOKENS, layer, on_device, small
from gpu.runtime import Runtime
from torch import Tensor

import ktops
from ktops.compat import KTMoEWrapper
from ktops.devices import streams
from ktops.testing.budgets import forward_budget, relative_error


@check("streams: the CUDA runtime in this process is usable", "streams")
def available(runtime: Runtime) -> None:
    assert streams.available(runtime.device.type), "a warning gives the reason"


@check("streams: Python does not wait for the experts", "streams")
@torch.no_grad()
def python_goes_on(runtime: Runtime) -> None:
    given = small(dtype=torch.bfloat16)
    expected = ktops.moe_sft(**given)
    with runtime.use(runtime.stream()):
        moved = on_device(given, runtime.device)
        outputs = [runtime.moe_sft(**moved) for _ in range(3)]  # allocating memory may wait
        runtime.synchronize()
        outputs.clear()
        with runtime.busy() as still_busy:
            outputs += [runtime.moe_sft(**moved) for _ in range(3)]
            assert still_busy(), "a call has waited for the stream"
        runtime.synchronize()
        assert all(torch.equal(output.cpu(), expected) for output in outputs)


@check("streams: calls on several streams", "streams")
@torch.no_grad()
def several_streams(runtime: Runtime) -> None:
    given = [small(dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    outputs = []
    for _ in range(20):
        for one in given:
            with runtime.use(runtime.stream()):
                outputs.append(runtime.moe_sft(**on_device(one, runtime.device)))
    runtime.synchronize()
    for index, output in enumerate(outputs):
        assert torch.equal(output.cpu(), ktops.moe_sft(**given[index % 4])), f"call {index}"


@check("pinned memory: reused, counted, released", "streams")
@torch.no_grad()
def pinned_memory(runtime: Runtime) -> None:
    runtime.reset()
    assert ktops.memory_stats()["bytes_pinned"] == 0
    with runtime.use(runtime.stream()):
        moved = on_device(small(), runtime.device)
        runtime.moe_sft(**moved)
        held = ktops.memory_stats()["bytes_pinned"]
        for _ in range(50):
            runtime.moe_sft(**moved)
        runtime.synchronize()
    assert ktops.memory_stats()["bytes_pinned"] == held > 0
    ktops.empty_cache()
    assert ktops.memory_stats()["bytes_pinned"] == 0


@check("CUDA graphs: each launch computes from what its inputs hold", "streams")
@torch.no_grad()
def graphs(runtime: Runtime) -> None:
    given = small(dtype=torch.bfloat16)
    with runtime.use(runtime.stream()):
        fixed = on_device(given, runtime.device)
        runtime.moe_sft(**fixed)
        runtime.synchronize()
        graph = runtime.capture(lambda: runtime.moe_sft(**fixed))
        for seed in range(3):
            tokens = small(dtype=torch.bfloat16, seed=seed)
            for name in TOKENS:
                runtime.copy(fixed[name], tokens[name].to(runtime.device))
            graph.launch()
            runtime.moe_sft(**fixed)  # a call outside uses other memory
            runtime.synchronize()
            expected = ktops.moe_sft(**given | {name: tokens[name] for name in TOKENS})
            assert torch.equal(graph.output.cpu(), expected), f"launch {seed}"
        graph.destroy()


@check("CUDA graphs: time of one token", "streams")
@torch.no_grad()
def time_of_a_launch(runtime: Runtime) -> Iterator[Row]:
    given = layer(runtime, 1)
    with runtime.use(runtime.stream()):
        fixed = on_device(given, runtime.device)
        called = runtime.seconds(lambda: runtime.moe_sft(**fixed))
        graph = runtime.capture(lambda: runtime.moe_sft(**fixed))
        launched = runtime.seconds(graph.launch)
        graph.destroy()
    alone = runtime.seconds(lambda: ktops.moe_sft(**given))
    yield {
        "T=1, ms": str(runtime.sizes.layer), "tokens on the CPU": 1e3 * alone,
        "on the device": 1e3 * called, "in a CUDA graph": 1e3 * launched,
    }  # fmt: skip


@check("errors on the CPU reach Python", "streams")
@torch.no_grad()
def errors(runtime: Runtime) -> None:
    with runtime.use(runtime.stream()):
        given = on_device(without_room(), runtime.device)
        with runtime.busy():  # or else the call might fail before its own end, which would raise
            output = runtime.moe_sft(**given)
        runtime.synchronize()
        assert output.isnan().all()
        try:
            streams.synchronize()
        except RuntimeError as error:
            assert "an earlier call failed on the CPU" in str(error)
        else:
            raise AssertionError("streams.synchronize() raised nothing")
        given = small()
        output = runtime.moe_sft(**on_device(given, runtime.device))
        runtime.synchronize()
        assert torch.equal(output.cpu(), ktops.moe_sft(**given))


def without_room() -> dict:
    """Returns arguments whose intermediate results do not fit into the address space."""
    given, size = small(T=2**17, H=1, I=1, E=1, K=4, dtype=torch.bfloat16), 1 << 27
    gate_up, down = given["gate_up_proj"], given["down_proj"]
    return given | {
        "gate_up_proj": gate_up[:, :1].expand(1, 2 * size, 1),
        "down_proj": down.expand(1, 1, size),
    }


def wrapper(given: dict, layer_idx: int = 0, **options) -> KTMoEWrapper:
    """Returns KTMoEWrapper with the weights of a layer in bfloat16."""
    num_experts, hidden_size, intermediate_size = given["down_proj"].shape
    made = KTMoEWrapper(
        layer_idx=layer_idx,
        num_experts=num_experts,
        num_experts_per_tok=given["topk_ids"].shape[1],
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        gpu_experts_mask=None,
        cpuinfer_threads=torch.get_num_threads(),
        threadpool_count=1,
        weight_path=None,
        chunked_prefill_size=512,
        method="BF16",
        **options,
    )
    made.load_weights_from_tensors(*given["gate_up_proj"].chunk(2, dim=1), given["down_proj"])
    return made


@check("KTMoEWrapper: submit and sync on a stream, in a CUDA graph too", "streams")
@torch.no_grad()
def kt_moe_wrapper(runtime: Runtime) -> None:
    given = small(dtype=torch.bfloat16, weights_dtype=torch.float32)
    experts, expected = wrapper(given), ktops.moe_sft(**given)

    def require_close(output: Tensor) -> None:
        error = relative_error(output.cpu(), expected)
        assert error <= forward_budget(torch.bfloat16), f"relative error {error:.1e}"

    stream = runtime.stream()
    with runtime.use(stream):
        x, ids, weights = (given[name].to(runtime.device, copy=True) for name in TOKENS)

        def submitted() -> Tensor:
            experts.submit_forward(x, ids, weights, runtime.address(stream))
            return experts.sync_forward(x, runtime.address(stream))

        output = submitted()
        runtime.synchronize()
        require_close(output)
        graph = runtime.capture(submitted)
        for _ in range(2):
            graph.launch()
            runtime.synchronize()
            require_close(graph.output)
        graph.destroy()


@check("KTMoEWrapper: experts deferred to the next layer", "streams")
@torch.no_grad()
def deferred_experts(runtime: Runtime) -> None:
    given = small(T=1, dtype=torch.bfloat16, weights_dtype=torch.float32)
    layers = wrapper(given, 0, max_deferred_experts_per_token=1), wrapper(given, 1)
    expected = ktops.moe_sft(**given).double()
    stream = runtime.stream()
    with runtime.use(stream):
        tokens = [given[name].to(runtime.device, copy=True) for name in TOKENS]
        first, last = (layer.forward(*tokens, runtime.address(stream)).cpu().double() for layer in layers)
    assert relative_error(first, expected) > 0.1, "nothing was deferred"
    error = relative_error(first + last, 2 * expected)
    assert error <= 2 * forward_budget(torch.bfloat16), f"relative error {error:.1e}"
