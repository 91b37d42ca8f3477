"""Calls that a CUDA graph captures are computed at each launch, from what its input tensors hold then."""

import gc
from collections.abc import Callable

import pytest
import torch
from stream_calls import arguments, expected, failing, run, watched
from torch import Tensor

import ktops
from ktops.devices import streams
from ktops.ops.arguments import MoeArguments


@pytest.mark.parametrize("reduce", [True, False])
def test_launches_compute_from_new_contents(cuda, stream, reduce):
    given = arguments()._replace(reduce=reduce)
    names = ("hidden_states", "topk_ids", "topk_weights")
    fixed = given._replace(**{name: torch.zeros_like(getattr(given, name)) for name in names})
    with cuda.capture(stream) as graph:
        output = streams.begin(fixed).result().fill_(7)
    assert (output == 7).all()
    outputs = [torch.empty_like(output) for _ in range(3)]
    contents = [arguments(seed=seed)._replace(reduce=reduce) for seed in range(3)]
    cuda.delays(seed=1, microseconds=500)
    with cuda.use(stream):
        for content, result in zip(contents, outputs, strict=True):
            for name in names:
                cuda.copy(getattr(fixed, name), getattr(content, name))
            graph.launch(stream)
            cuda.copy(result, output)
    cuda.synchronize(stream)
    for content, result in zip(contents, outputs, strict=True):
        weights = {name: getattr(given, name) for name in ("gate_up_proj", "down_proj")}
        assert torch.equal(result, expected(content._replace(**weights)))
    graph.destroy()


def test_a_graph_shares_no_memory_with_calls_outside_of_it(cuda, stream):
    """Its launches come in any order, on any stream, with other calls."""
    given, other, elsewhere = arguments(seed=0), arguments(seed=1), cuda.stream()
    with cuda.use(stream):
        call = streams.begin(other)
        cuda.block(stream)
        before = call.result()
    with cuda.capture(stream) as graph:
        first = streams.begin(given).result()
        second = streams.begin(other).result()
    for _ in range(3):
        graph.launch(elsewhere)
    cuda.synchronize(elsewhere)
    assert torch.equal(first, expected(given)) and torch.equal(second, expected(other))
    graph.launch(elsewhere)
    assert torch.equal(run(cuda, cuda.stream(), given), expected(given))
    cuda.unblock(stream)
    streams.synchronize()
    assert torch.equal(before, expected(other))
    graph.destroy()


def test_memory_and_weights_live_as_long_as_the_graph(cuda, stream):
    streams.synchronize()
    ktops.empty_cache()
    assert cuda.pinned_bytes() == 0
    given = arguments()
    down_proj, weights = watched(given.down_proj)
    given = given._replace(down_proj=down_proj)
    with cuda.capture(stream) as graph:
        output = streams.begin(given).result()
    exact = expected(given)
    fixed = given[:3]
    del given, down_proj
    streams.synchronize()
    gc.collect()
    ktops.empty_cache()
    assert weights() is not None and cuda.pinned_bytes() > 0
    graph.launch(stream)
    graph.destroy()
    cuda.synchronize(stream)
    assert torch.equal(output, exact) and len(fixed) == 3
    cuda.functions.fake_wait_for_destructors()
    with cuda.capture(stream) as graph:
        held = cuda.pinned_bytes()
        streams.begin(arguments()).result()
    assert cuda.pinned_bytes() == held
    graph.destroy()
    cuda.functions.fake_wait_for_destructors()
    gc.collect()
    ktops.empty_cache()
    assert weights() is None and cuda.pinned_bytes() == 0


def chain(x: Tensor, layers: list[MoeArguments], layer: Callable[[MoeArguments], Tensor]) -> Tensor:
    for given in layers:
        x = layer(given._replace(hidden_states=x))
    return x


@pytest.mark.parametrize("forked", [False, True], ids=["one", "forked"])
def test_layers_of_a_graph_share_memory(cuda, stream, forked):
    """On one stream, or each on a stream of its own, as SGLang does."""
    ktops.empty_cache()
    layers = [arguments(seed=seed) for seed in range(20)]
    x = torch.zeros_like(layers[0].hidden_states)

    def layer(given: MoeArguments) -> Tensor:
        if not forked:
            return streams.begin(given).result()
        with cuda.use(side := cuda.stream()):
            cuda.wait(stream, given.hidden_states)
            output = streams.begin(given).result()
        cuda.wait(side, output)
        return output

    with cuda.capture(stream) as graph:
        first = streams.begin(layers[0]._replace(hidden_states=x)).result()
        held = cuda.pinned_bytes()
        output = chain(first, layers[1:], layer)
    assert cuda.pinned_bytes() == held > 0
    cuda.delays(seed=1, microseconds=50)
    for seed in range(3):
        new = arguments(seed=seed).hidden_states
        with cuda.use(stream):
            cuda.copy(x, new)
            graph.launch(stream)
        cuda.synchronize(stream)
        assert torch.equal(output, chain(new, layers, expected))
    ktops.empty_cache()
    assert cuda.pinned_bytes() == held
    graph.destroy()
    cuda.functions.fake_wait_for_destructors()
    ktops.empty_cache()
    assert cuda.pinned_bytes() == 0


def test_branches_of_a_graph_share_memory(cuda, stream):
    """A branch waits for another one that has ended; calls in flight have memory of their own."""
    ktops.empty_cache()
    given, outputs, held = [arguments(seed=seed) for seed in range(4)], [], []
    sides = [cuda.stream() for _ in range(4)]
    with cuda.capture(stream) as graph:
        for side in sides:
            with cuda.use(side):
                cuda.wait(stream, given[0].hidden_states)
        for pair in (0, 2):
            calls = []
            for i in (pair, pair + 1):
                with cuda.use(sides[i]):
                    calls.append(streams.begin(given[i]))
            outputs += [call.result() for call in calls]
            held.append(cuda.pinned_bytes())
    assert held[1] == held[0] > 0
    graph.launch(stream)
    cuda.synchronize(stream)
    assert all(torch.equal(output, expected(one)) for output, one in zip(outputs, given, strict=True))
    graph.destroy()


def test_graphs_share_no_memory(cuda, stream):
    """Neither with each other, nor with what was captured and destroyed while they are launched."""
    ktops.empty_cache()
    given, graphs, outputs = [arguments(seed=seed) for seed in range(3)], [], []
    for one in given:
        with cuda.capture(stream) as graph:
            outputs.append([streams.begin(one).result() for _ in range(2)])
        graphs.append(graph)
        held = cuda.pinned_bytes() // len(graphs)
    assert cuda.pinned_bytes() == 3 * held > 0
    on = [cuda.stream() for _ in given]
    for seed in range(20):
        cuda.delays(seed, microseconds=100)
        for graph, side in zip(graphs, on, strict=True):
            graph.launch(side)
        output = run(cuda, stream, given[seed % 3])
        streams.synchronize()
        assert torch.equal(output, expected(given[seed % 3]))
        for results, one in zip(outputs, given, strict=True):
            assert all(torch.equal(result.clone(), expected(one)) for result in results)
            for result in results:
                result.zero_()
    for graph in graphs:
        graph.destroy()


def test_begin_and_result_belong_to_the_same_capture(cuda, stream):
    given = arguments()
    with cuda.use(stream):
        before = streams.begin(given)
    with cuda.capture(stream) as graph:
        captured = streams.begin(given)
        with pytest.raises(RuntimeError, match="result of a call before a capture must be used before it"):
            before.result()
    with cuda.use(stream), pytest.raises(RuntimeError, match="captured must be used in the same capture"):
        captured.result()
    with cuda.capture(stream) as other:
        with pytest.raises(RuntimeError, match="captured must be used in the same capture"):
            captured.result()
        streams.begin(given).result()
    with cuda.use(stream):
        output = before.result()
    graph.launch(stream)
    del captured
    graph.launch(stream)
    cuda.synchronize(stream)
    assert torch.equal(output, expected(given))
    for one in (graph, other):
        one.destroy()


def test_an_error_of_the_cpu_in_a_launch(cuda, stream):
    """Every launch may fail."""
    with cuda.capture(stream) as graph:
        output = streams.begin(failing()).result()
    for _ in range(2):
        output.zero_()
        graph.launch(stream)
        with pytest.raises(RuntimeError, match="an earlier call failed on the CPU"):
            streams.synchronize()
        assert output.isnan().all()
    graph.destroy()


@pytest.mark.parametrize(
    "function",
    ["cudaUserObjectCreate", "cudaGraphRetainUserObject", "cudaLaunchHostFunc", "cudaEventRecord"],
)
def test_an_error_of_cuda_in_a_capture_leaves_nothing(cuda, stream, function):
    streams.synchronize()
    ktops.empty_cache()
    given = arguments()
    down_proj, weights = watched(given.down_proj)
    given = given._replace(down_proj=down_proj)
    with cuda.capture(stream) as graph:
        cuda.fail(function)
        with pytest.raises(RuntimeError, match=f"kt: {function} failed: invalid argument"):
            streams.begin(given).result()
        output = streams.begin(given).result()
    graph.launch(stream)
    cuda.synchronize(stream)
    assert torch.equal(output, expected(given))
    del given, down_proj
    graph.destroy()
    cuda.functions.fake_wait_for_destructors()
    gc.collect()
    ktops.empty_cache()
    assert cuda.pinned_bytes() == 0 and weights() is None


def test_a_capture_that_something_else_invalidates(cuda, stream):
    failed = pytest.raises(RuntimeError, match="cudaStreamEndCapture failed with status 901")
    with failed, cuda.capture(stream):
        assert cuda.functions.cudaDeviceSynchronize() == 900
        with pytest.raises(RuntimeError, match="capture that an earlier error has invalidated"):
            streams.begin(arguments())
    assert torch.equal(run(cuda, stream, arguments()), expected(arguments()))
