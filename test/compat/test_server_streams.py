"""KTMoEWrapper on streams of CUDA that need no GPU. Operators of PyTorch run in stream order, too."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from tiny_layer import SIZES, TOKENS, adapters, inputs, make

from ktops._warn import warn_once
from ktops.devices import streams
from ktops.testing import fake_cuda
from ktops.testing.fake_cuda.operators import OperatorsInOrder

pytestmark = pytest.mark.usefixtures("single_thread")

H = SIZES["hidden_size"]
MANY = {"num_experts": 24, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MASK = torch.arange(24) % 5 == 0


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda.installed() as cuda:
        monkeypatch.setattr(streams, "available", lambda kind: kind in streams.STREAMS)
        yield cuda


@pytest.fixture
def device(cuda):
    with OperatorsInOrder(cuda) as device:
        yield device
    assert not device.errors


@contextmanager
def on_host():
    """Computes without streams inside the context."""
    with torch._C._DisableTorchDispatch(), mock.patch.object(streams, "available", lambda kind: False):
        yield


def model(deferred=(0, 0, 0), **options) -> list:
    return [
        make("BF16", layer_idx=i, max_deferred_experts_per_token=count, **(MANY | options))
        for i, count in enumerate(deferred)
    ]


def all_routes(layers, tokens: int = TOKENS, seed: int = 0) -> list:
    return [inputs(wrapper, tokens, seed=seed + wrapper.layer_idx)[1:] for wrapper in layers]


def run(layers, x, routes, layer):
    """Returns the hidden states after all layers, each with a residual."""
    for wrapper, (ids, weights) in zip(layers, routes, strict=True):
        x = x + layer(wrapper, x, ids, weights)
    return x


def forward(wrapper, x, ids, weights):
    return wrapper.forward(x, ids, weights)


def expected(layers, x, routes):
    with on_host():
        return run(layers, x, routes, forward)


class Server:
    """Runs a layer as SGLang does, on one stream or with one more for each layer."""

    def __init__(self, cuda, main, dual: bool) -> None:
        self.cuda, self.main, self.dual = cuda, main, dual
        self.sides = {}

    def __call__(self, wrapper, x, ids, weights):
        if not self.dual:
            wrapper.submit_forward(x, ids, weights, self.main.handle)
            x.sin()
            return wrapper.sync_forward(x, self.main.handle)
        side = self.sides.setdefault(wrapper.layer_idx, self.cuda.stream())
        with self.cuda.use(side):
            self.cuda.wait(self.main, x)
            wrapper.submit_forward(x, ids, weights, side.handle)
        x.sin()
        with self.cuda.use(side):
            output = wrapper.sync_forward(x, side.handle)
        self.cuda.wait(side, output)
        return output


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("deferred", [(0, 0, 0), (1, 3, 0)], ids=["plain", "deferred"])
@pytest.mark.parametrize("dual", [False, True], ids=["one", "dual"])
def test_servers_get_the_bits_of_the_cpu(cuda, device, dual, deferred, mask):
    layers, main = model(deferred, gpu_experts_mask=mask), cuda.stream()
    server = Server(cuda, main, dual)
    results, wanted = [], []
    for seed, tokens in enumerate((TOKENS, 1, 33, TOKENS)):
        x, routes = inputs(layers[0], tokens, seed)[0], all_routes(layers, tokens, 10 * seed)
        wanted.append(expected(layers, x, routes))
        cuda.delays(seed, microseconds=300)
        with cuda.use(main):
            routes = [tuple(map(device.tensor, route)) for route in routes]
            results.append(run(layers, device.tensor(x), routes, server))
    cuda.synchronize(main)
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(device.read(result), exact)


def test_python_waits_for_nothing(cuda, device):
    """All layers return while the stream is blocked, and inputs may be overwritten in its order."""
    layers, main = model((2, 1, 0), gpu_experts_mask=MASK), cuda.stream()
    x, routes = inputs(layers[0])[0], all_routes(layers)
    exact = expected(layers, x, routes)
    with cuda.use(main):
        cuda.block(main)
        given = device.tensor(x), [tuple(map(device.tensor, route)) for route in routes]
        output = run(layers, *given, forward)
        for tensor in (given[0], *sum(given[1], ())):
            tensor.zero_()
    assert not torch.equal(device.read(output), exact)
    cuda.unblock(main)
    cuda.synchronize(main)
    assert torch.equal(device.read(output), exact)


def test_streams_are_those_of_the_arguments(cuda, device):
    """Begun on one, collected on another, while a third is the current one."""
    (wrapper,) = model((0,))
    routed = inputs(wrapper)
    with on_host():
        exact = wrapper.forward(*routed)
    first, second, current = (cuda.stream() for _ in range(3))
    cuda.block(first)
    with cuda.use(current):
        wrapper.submit_forward(*map(device.tensor, routed), first.handle)
        output = wrapper.sync_forward(torch.empty(0, dtype=torch.bfloat16), second)
        cuda.synchronize(current)
    assert not torch.equal(device.read(output), exact)
    with cuda.use(second):
        later = output.clone()
    cuda.unblock(first)
    cuda.synchronize(second)
    assert torch.equal(device.read(later), exact)


def test_streams_by_their_address(monkeypatch):
    """PyTorch would take 0 for no address, and return any stream."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: f"{address} of {device}")
    cuda = streams.CudaStreams()
    assert cuda.at(0, torch.device("cuda:1")) == "default of cuda:1"
    assert cuda.at(64, torch.device("cuda:1")) == "64 of cuda:1"


def test_layers_begin_before_others_are_collected(cuda, device):
    layers, main = model(), cuda.stream()
    routed = [inputs(wrapper, seed=wrapper.layer_idx) for wrapper in layers]
    with on_host():
        exact = [wrapper.forward(*given) for wrapper, given in zip(layers, routed, strict=True)]
    cuda.delays(seed=1, microseconds=300)
    with cuda.use(main):
        for wrapper, given in zip(layers, routed, strict=True):
            wrapper.submit_forward(*map(device.tensor, given))
        like = torch.empty(0, dtype=torch.float32)
        outputs = {i: layers[i].sync_forward(like) for i in (1, 2, 0)}
    cuda.synchronize(main)
    for i, output in outputs.items():
        assert output.dtype == torch.float32 and torch.equal(device.read(output), exact[i].float())


def test_a_changed_mask_holds_from_the_next_call_on(cuda, device):
    (wrapper,) = model((0,), gpu_experts_mask=MASK)
    routed, main, exact, outputs = inputs(wrapper), cuda.stream(), [], []
    cuda.block(main)
    for mask in (MASK, ~MASK, torch.zeros(24, dtype=torch.bool), MASK):
        wrapper.gpu_experts_mask.copy_(mask)
        with on_host():
            exact.append(wrapper.forward(*routed))
        outputs.append(wrapper.forward(*map(device.tensor, routed), main.handle))
    cuda.unblock(main)
    cuda.synchronize(main)
    assert not any(torch.equal(exact[i], exact[i + 1]) for i in range(3))
    assert all(torch.equal(device.read(a), b) for a, b in zip(outputs, exact, strict=True))


@pytest.mark.parametrize("dual", [False, True], ids=["one", "dual"])
def test_graphs_of_several_batch_sizes(cuda, device, dual):
    """As a server captures and launches them; the mask may change between launches."""
    layers, main = model((2, 1, 0), gpu_experts_mask=MASK), cuda.stream()
    server, graphs = Server(cuda, main, dual), {}
    for tokens in (8, 2, 1):
        static = (
            device.tensor(torch.zeros(tokens, H, dtype=torch.bfloat16)),
            [tuple(map(device.tensor, route)) for route in all_routes(layers, tokens)],
        )
        with cuda.capture(main) as graph:
            output = run(layers, *static, server)
        graphs[tokens] = graph, static, output
    results, wanted = [], []
    for seed, tokens in enumerate((2, 8, 8, 1, 2)):
        graph, (x, routes), output = graphs[tokens]
        for wrapper in layers:
            wrapper.gpu_experts_mask.copy_(MASK.roll(seed))
        new = inputs(layers[0], tokens, seed)[0], all_routes(layers, tokens, seed)
        wanted.append(expected(layers, *new))
        cuda.delays(seed, microseconds=300)
        with cuda.use(main):
            x.copy_(device.tensor(new[0]))
            for old, route in zip(routes, new[1], strict=True):
                for tensor, value in zip(old, route, strict=True):
                    tensor.copy_(device.tensor(value))
            graph.launch(main)
            results.append(output.clone())
        cuda.synchronize(main)  # the mask is that of the launch
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(device.read(result), exact)
    for graph, *_ in graphs.values():
        graph.destroy()


def test_captures_notice_work_that_no_stream_waits_for(cuda, device):
    main, side, x = cuda.stream(), cuda.stream(), device.tensor(torch.ones(3))
    message = "cudaStreamEndCapture failed with status 904"
    with pytest.raises(RuntimeError, match=message), cuda.capture(main), cuda.use(side):
        cuda.wait(main, x)
        x.sin()


def test_all_may_be_deferred(cuda, device):
    layers, main = model((3, 0)), cuda.stream()
    x, routes = inputs(layers[0])[0], all_routes(layers)
    exact = expected(layers, x, routes)
    with cuda.use(main):
        first, *_ = routes = [tuple(map(device.tensor, route)) for route in routes]
        x = device.tensor(x)
        early = layers[0].forward(x, *first)
        output = x + early + layers[1].forward(x + early, *routes[1])
    cuda.synchronize(main)
    assert not device.read(early).any() and torch.equal(device.read(output), exact)


def test_another_number_of_tokens(cuda, device):
    first, second = model((1, 0))
    first.forward(*map(device.tensor, inputs(first)))
    with pytest.raises(RuntimeError, match="layer 0 deferred experts of 7 tokens, but layer 1 got 3 tokens"):
        second.submit_forward(*map(device.tensor, inputs(second, 3)))
    with on_host():
        exact = second.forward(*inputs(second, 3))
    main = cuda.stream()
    output = second.forward(*map(device.tensor, inputs(second, 3)), main.handle)
    cuda.synchronize(main)
    assert torch.equal(device.read(output), exact)


def test_a_submission_may_be_dropped(cuda, device):
    (wrapper,), main = model((0,)), cuda.stream()
    with on_host():
        exact = wrapper.forward(*inputs(wrapper))
    for seed in (1, 2, 0):
        wrapper.submit_forward(*map(device.tensor, inputs(wrapper, seed=seed)), main.handle)
    output = wrapper.sync_forward(torch.empty(0, dtype=torch.bfloat16), main.handle)
    cuda.synchronize(main)
    assert torch.equal(device.read(output), exact)


def test_what_belongs_together_stays_in_one_graph(cuda, device):
    (first, second), main = model((1, 0)), cuda.stream()
    routed = [tuple(map(device.tensor, inputs(wrapper))) for wrapper in (first, second)]
    message = (
        "a CUDA graph captures only one of layer 0, which deferred experts, and layer 1, which adds them"
    )
    with cuda.capture(main) as graph:
        first.forward(*routed[0])
    graph.destroy()
    with cuda.use(main), pytest.raises(RuntimeError, match=message):
        second.forward(*routed[1])
    first.forward(*routed[0])
    with cuda.capture(main) as graph:
        with pytest.raises(RuntimeError, match=message):
            second.forward(*routed[1])
        second.submit_forward(*routed[1])
    graph.destroy()
    with cuda.use(main), pytest.raises(RuntimeError, match="must be used in the same capture"):
        second.sync_forward(routed[1][0])
    with on_host():
        exact = second.forward(*inputs(second))
    output = second.forward(*routed[1], main.handle)
    cuda.synchronize(main)
    assert torch.equal(device.read(output), exact)


def test_a_graph_cannot_capture_copies_that_python_waits_for(cuda, monkeypatch):
    (wrapper,), training = model((0,)), make("AMXBF16_SFT_SkipLoRA")
    with cuda.capture(cuda.stream()) as graph:
        with pytest.raises(RuntimeError, match="a CUDA graph can capture only forwards for inference"):
            training.forward(*inputs(training))
        monkeypatch.setattr(streams, "available", lambda kind: False)
        with pytest.raises(RuntimeError, match="start the server with --disable-cuda-graph"):
            wrapper.forward(*inputs(wrapper))
    graph.destroy()


def test_graphs_copy_the_mask_from_pinned_memory(cuda, device, monkeypatch):
    """Which the first call allocates, because a capture must not."""
    monkeypatch.setattr("ktops.compat.masks.PINNED", ("cpu",))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda mask: pinned.append(mask.clone()) or pinned[-1])
    (wrapper,), main = model((0,)), cuda.stream()
    routed, mask = tuple(map(device.tensor, inputs(wrapper))), wrapper.gpu_experts_mask
    with cuda.capture(main) as graph, pytest.raises(RuntimeError, match="call the layer once before"):
        wrapper.forward(*routed)
    graph.destroy()
    wrapper.forward(*routed, main.handle)
    with cuda.capture(main) as graph:
        output = wrapper.forward(*routed)
    mask.copy_(MASK)
    graph.launch(main)
    cuda.synchronize(main)
    with on_host():
        exact = wrapper.forward(*inputs(wrapper))
    assert torch.equal(device.read(output), exact) and wrapper.gpu_experts_mask is mask
    assert len(pinned) == 1 and torch.equal(pinned[0][:-1], MASK)
    graph.destroy()


def test_adapters_in_a_graph(cuda, device):
    wrapper, main = make("AMXBF16_SFT", num_gpu_experts=1), cuda.stream()
    factors = adapters(wrapper)
    wrapper.init_lora_weights(**factors)
    fixed = tuple(map(device.tensor, inputs(wrapper)))
    with cuda.capture(main) as graph:
        wrapper.submit_forward_inference(*fixed)
        output = wrapper.sync_forward_inference()
    for seed in (1, 2):
        with cuda.use(main):
            for tensor, value in zip(fixed, inputs(wrapper, seed=seed), strict=True):
                tensor.copy_(device.tensor(value))
            graph.launch(main)
        cuda.synchronize(main)
        with on_host():
            exact = wrapper.forward(*inputs(wrapper, seed=seed), save_for_backward=False)
        assert torch.equal(device.read(output), exact)
    graph.destroy()
    factors["up_lora_b"].zero_()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="adapters have changed since a CUDA graph captured"):
        wrapper.submit_forward_inference(*fixed, main.handle)
    output = wrapper.sync_forward_inference(main.handle)
    cuda.synchronize(main)
    with on_host():
        exact = wrapper.forward(*inputs(wrapper, seed=2), save_for_backward=False)
    assert torch.equal(device.read(output), exact)
