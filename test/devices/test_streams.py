"""``ktops.devices.streams``: what kt::moe_fwd enqueues on a stream, and when it is computed."""

import functools
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stream_calls import SIZES, arguments, expected, failing, run, watched

import ktops
from ktops.devices import streams
from ktops.ops.arguments import TENSORS
from ktops.testing import fake_cuda
from ktops.testing.compare import threads
from ktops.testing.inputs import moe_inputs, op_arguments

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_equals_the_operator_bitwise(cuda, stream, num_tokens, dtype, reduce):
    options = {"dtype": dtype, "lora_rank": 4, "bias": True, "invalid_ids": True, "ids_dtype": torch.int32}
    given = arguments(T=num_tokens, **options)._replace(reduce=reduce)
    assert torch.equal(run(cuda, stream, given), expected(given))


def test_weights_in_a_format_and_tensors_that_are_not_contiguous(cuda, stream):
    inputs = moe_inputs(**SIZES | {"H": 64, "I": 64}, dtype=torch.bfloat16, weights_dtype=torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        inputs[name] = ktops.quantize(inputs[name], "int4", group_size=32)
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        inputs[name] = inputs[name].mT.contiguous().mT
    given = op_arguments(inputs)
    assert torch.equal(run(cuda, stream, given), expected(given))


def test_python_waits_for_nothing(cuda, stream):
    """Begin and result return while the stream is blocked; the values at the time of the copies count."""
    given, later = arguments(seed=0), arguments(seed=1)
    with cuda.use(stream):
        cuda.block(stream)
        output = streams.begin(given).result().fill_(7)
        given.hidden_states.copy_(later.hidden_states)
    assert (output == 7).all()
    cuda.unblock(stream)
    cuda.synchronize(stream)
    assert torch.equal(output, expected(given))


def test_calls_may_end_in_any_order(cuda, stream):
    given = [arguments(seed=seed) for seed in range(4)]
    with cuda.use(stream):
        calls = [streams.begin(one) for one in given]
        outputs = {i: calls[i].result() for i in (2, 0, 3, 1)}
    cuda.synchronize(stream)
    assert all(torch.equal(outputs[i], expected(one)) for i, one in enumerate(given))


def test_default_streams_of_two_devices_have_memory_of_their_own(cuda):
    """Their handles are equal, but not their order."""
    first, second = fake_cuda.Stream(0, device=0), fake_cuda.Stream(0, device=1)
    given = [arguments(seed=seed) for seed in range(2)]
    with cuda.use(first):
        call = streams.begin(given[0])
        cuda.block(first)
        late = call.result()
    assert torch.equal(run(cuda, second, given[1]), expected(given[1]))
    cuda.unblock(first)
    streams.synchronize()
    assert torch.equal(late, expected(given[0]))


def test_errors_of_arguments_are_those_of_the_operator(cuda, stream):
    good = arguments()
    cases = [
        {"topk_ids": good.topk_ids[:-1]},
        {"topk_ids": good.topk_ids.to(torch.int16)},
        {"hidden_states": good.hidden_states[0]},
        {"topk_weights": good.topk_weights.long()},
        {"down_proj": good.down_proj[:, :, :-1]},
        {"activation": "unknown"},
        {"compute": "int8"},
    ]
    for case in cases:
        given = good._replace(**case)
        with pytest.raises(RuntimeError, match=r"^kt::moe_fwd: ") as of_operator:
            torch.ops.kt.moe_fwd(*given)
        enqueued = [cuda.calls(name) for name in ("cudaMemcpyAsync", "cudaLaunchHostFunc")]
        with pytest.raises(RuntimeError) as of_stream, cuda.use(stream):
            streams.begin(given)
        assert str(of_stream.value) == str(of_operator.value)
        assert enqueued == [cuda.calls(name) for name in ("cudaMemcpyAsync", "cudaLaunchHostFunc")]


def test_misuse_of_the_operators(cuda, stream):
    given, output = arguments(), torch.empty(5, 40)
    with pytest.raises(RuntimeError, match=r"moe_fwd_begin: hidden_states must be contiguous"):
        torch.ops.kt.moe_fwd_begin(*given._replace(hidden_states=torch.zeros(40, 5).mT), stream.handle)
    with pytest.raises(RuntimeError, match=r"stream must not be cudaStreamPerThread"):
        torch.ops.kt.moe_fwd_begin(*given, 2)
    call = torch.ops.kt.moe_fwd_begin(*given, stream.handle)
    with pytest.raises(RuntimeError, match=r"output must have 800 bytes, got 400"):
        torch.ops.kt.moe_fwd_end(call, output[:, :20].contiguous())
    torch.ops.kt.moe_fwd_end(call, output)
    with pytest.raises(RuntimeError, match=rf"call must be one that began and did not end, got {call}$"):
        torch.ops.kt.moe_fwd_end(call, output)
    torch.ops.kt.moe_fwd_end(call, None)
    cuda.synchronize(stream)
    assert torch.equal(output, expected(given))


@pytest.mark.parametrize("function", ["cudaHostAlloc", "cudaMemcpyAsync", "cudaLaunchHostFunc"])
def test_an_error_of_cuda_names_the_function(cuda, stream, function):
    ktops.empty_cache()
    given = arguments()
    with cuda.use(stream):
        cuda.fail(function)
        with pytest.raises(RuntimeError, match=f"kt: {function} failed: invalid argument"):
            streams.begin(given)
        if function != "cudaHostAlloc":
            call = streams.begin(given)
            cuda.fail(function)
            with pytest.raises(RuntimeError, match=f"kt: {function} failed: invalid argument"):
                call.result()
    assert torch.equal(run(cuda, stream, given), expected(given))


def test_an_error_of_the_cpu_reaches_a_later_call(cuda, stream):
    with pytest.raises(RuntimeError, match="out of memory"):
        expected(failing())

    def run_failing() -> torch.Tensor:
        """Enqueues the whole call before it fails, or else its own end would raise."""
        cuda.block(stream)
        with cuda.use(stream):
            output = streams.begin(failing()).result()
        cuda.unblock(stream)
        cuda.synchronize(stream)
        return output

    assert run_failing().isnan().all()
    with pytest.raises(
        RuntimeError, match="an earlier call failed on the CPU, and its result is NaN: kt: out of"
    ):
        streams.begin(arguments())
    assert torch.equal(run(cuda, stream, arguments()), expected(arguments()))
    run_failing()
    with pytest.raises(RuntimeError, match="an earlier call failed on the CPU"):
        streams.synchronize()


def test_a_result_that_nobody_uses(cuda, stream):
    """The call is computed, its memory reused."""
    ktops.empty_cache()
    with cuda.use(stream):
        streams.begin(arguments())
        streams.begin(arguments())
        cuda.synchronize(stream)
    streams.synchronize()
    held = ktops.memory_stats()["bytes_pinned"]
    run(cuda, stream, arguments())
    assert ktops.memory_stats()["bytes_pinned"] == held > 0


def test_no_memory_on_the_device(cuda, stream, monkeypatch):
    """The call is given up."""

    def no_memory(arguments):
        raise torch.OutOfMemoryError("no memory")

    ktops.empty_cache()
    with monkeypatch.context() as patched, cuda.use(stream):
        patched.setattr(streams, "empty_output", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            streams.begin(arguments())
    cuda.synchronize(stream)
    streams.synchronize()
    ktops.empty_cache()
    assert cuda.pinned_bytes() == 0


def test_memory_is_kept_counted_and_released(cuda, stream):
    ktops.empty_cache()
    assert ktops.memory_stats()["bytes_pinned"] == cuda.pinned_bytes() == 0
    given = arguments()
    run(cuda, stream, given)
    held, allocations = cuda.pinned_bytes(), cuda.calls("cudaHostAlloc")
    assert ktops.memory_stats()["bytes_pinned"] == held >= 2 * given.hidden_states.nbytes
    with cuda.use(stream):
        for _ in range(5):
            streams.begin(given).result()
    cuda.block(stream)
    with cuda.use(stream):
        streams.begin(given).result()
    assert cuda.calls("cudaHostAlloc") == allocations
    cuda.unblock(stream)
    ktops.empty_cache()
    assert ktops.memory_stats()["bytes_pinned"] == cuda.pinned_bytes() == 0


def test_a_call_keeps_the_memory_of_its_experts_until_it_is_computed(cuda, stream):
    """Even if a weight gets other memory meanwhile, or is deleted; and no longer, without another call."""
    inputs = moe_inputs(**SIZES | {"H": 64, "I": 64}, bias=True, lora_rank=4)
    for name in ("gate_up_proj", "down_proj"):
        inputs[name] = ktops.quantize(inputs[name], "uint4", group_size=32)
    given = op_arguments(inputs)
    exact, memory = expected(given), {}
    for name in TENSORS[3:]:
        copy, memory[name] = watched(getattr(given, name))
        given = given._replace(**{name: copy})
    with cuda.use(stream):
        cuda.block(stream)
        output = streams.begin(given).result()
        streams.begin(arguments()).result()
    for name in memory:
        getattr(given, name).data = torch.empty(0)
    del given, copy
    gc.collect()
    assert [name for name, array in memory.items() if array() is None] == []
    cuda.unblock(stream)
    cuda.synchronize(stream)
    gc.collect()
    assert torch.equal(output, exact)
    assert [name for name, array in memory.items() if array() is not None] == []


def test_torchs_number_of_threads_applies(cuda, stream):
    """If it is raised after the worker has used threads, a new worker with as many takes over."""
    given, present = arguments(T=64, H=256, I=256), []
    with threads(1):
        exact = expected(given)
    for count in (2, 3):
        with threads(count), ktops.profile() as profile:
            assert torch.equal(run(cuda, stream, given), exact)
        present.append(set(os.listdir("/proc/self/task")))
    assert len(present[1] - present[0]) >= 3
    assert {step.op for step in profile.steps} == {"moe_fwd"}


def test_cuda_12():
    """The function that describes a capture has another name and signature than in CUDA 13."""
    with fake_cuda.installed(fake_cuda.library(12000)) as cuda:
        stream, given = cuda.stream(), arguments()
        with cuda.capture(stream) as graph:
            output = streams.begin(given).result()
        graph.launch(stream)
        cuda.synchronize(stream)
        assert torch.equal(output, expected(given))
        graph.destroy()


def test_threads_load_the_runtime_once(monkeypatch):
    """Or else calls that began after the first time could not end."""
    second, loads = threading.Event(), []

    @functools.lru_cache(maxsize=1)
    def load() -> None:
        loads.append(threading.get_ident())
        second.wait()

    def ask() -> bool:
        return streams.available.__wrapped__("cuda")

    def ask_meanwhile() -> bool:
        second.set()
        return ask()

    monkeypatch.setattr(streams, "load", load)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask), pool.submit(ask_meanwhile)]
    assert all(answer.result() for answer in answers) and len(loads) == 1


def test_a_library_without_the_functions(tmp_path):
    with pytest.raises(RuntimeError, match=r"kt: could not load the CUDA runtime: .*missing"):
        torch.ops.kt.load_cuda(str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match="kt: no CUDA runtime in this process has cudaGetDevice"):
        torch.ops.kt.load_cuda("libc.so.6")


def test_without_the_runtime_there_is_a_warning(monkeypatch):
    def load():
        raise RuntimeError("kt: no CUDA runtime in this process has cudaGetDevice")

    monkeypatch.setattr(streams, "load", load)
    reason = "Python waits for the experts, which cannot be computed in stream order: kt: no CUDA runtime"
    with pytest.warns(UserWarning, match=reason):
        assert not streams.available.__wrapped__("cuda")
    assert not streams.available("xpu") and not streams.available("cpu")
