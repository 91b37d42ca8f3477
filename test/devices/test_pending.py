"""The tensor that experts return before they are computed behaves as any other."""

import copy
import io
import pickle

import pytest
import torch
from peft_models import adapted
from stream_calls import arguments, expected
from tiny_models import tiny_batch, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ktops
from ktops.devices import kernels, pending, streams
from ktops.devices.pending import PendingTensor
from ktops.ops.arguments import MoeArguments


@pytest.fixture
def call(cuda, stream):
    """``call()`` begins the same call again and returns its output, pending."""
    cuda.operators_wait = True

    def begin(given: MoeArguments | None = None) -> PendingTensor:
        with cuda.use(stream):
            begun = streams.begin(given or arguments())
        return PendingTensor(begun, begun.output)

    yield begin
    cuda.operators_wait = False


def test_metadata_and_views_do_not_collect(call, cuda):
    before = cuda.calls("cudaLaunchHostFunc")
    output, plain = call(), expected(arguments())
    views = {
        "view": lambda y: y.view(-1),
        "reshape": lambda y: y.reshape(1, 5, 40),
        "index": lambda y: y[1:, None],
        "transpose": lambda y: y.mT,
        "detach": lambda y: y.detach(),
        "split": lambda y: y.split(2)[1],
        "unbind": lambda y: y.unbind()[1],
        "expand": lambda y: y.expand(2, 5, 40),
    }
    for view in views.values():
        pending_view, plain_view = view(output), view(plain)
        assert isinstance(pending_view, PendingTensor)
        assert pending_view.shape == plain_view.shape and pending_view.stride() == plain_view.stride()
        assert pending_view.storage_offset() == plain_view.storage_offset()
    assert (output.dtype, output.device, len(output)) == (plain.dtype, plain.device, 5)
    assert cuda.calls("cudaLaunchHostFunc") == before + 1
    for name, view in views.items():
        assert torch.equal(view(call()), view(plain)), name
        assert torch.equal(view(output) * 1, view(plain)), name


def saved(y):
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


def write_through_view(y):
    view = y.view(-1)
    y.add_(1)
    view[0] = 3
    return y


def transpose_in_place(y):
    assert y.t_().shape == y.shape == (40, 5)
    return y


def assign_data(y):
    y.data = torch.ones(3)
    return y * 2


def gradient_of_other(y):
    other = torch.ones(40, requires_grad=True)
    (y * other).sum().backward()
    return other.grad


def gradient_of_itself(y):
    y.requires_grad_()
    (y * y).sum().backward()
    return y.grad


USES = {
    "arithmetic": lambda y: y + 2 * y,
    "other first": lambda y: torch.ones(5, 40) - y,
    "list of tensors": lambda y: torch.cat([y, torch.ones(1, 40), y]),
    "keyword": lambda y: torch.nn.functional.linear(input=torch.ones(2, 40), weight=y),
    "matrix product": lambda y: y @ y.mT,
    "copy": lambda y: y.clone(),
    "to the cpu": lambda y: y.cpu().double(),
    "copied into": lambda y: torch.zeros(5, 40).copy_(y),
    "filled": lambda y: y.fill_(3),
    "out": lambda y: torch.add(torch.ones(5, 40), 1, out=y),
    "in place": lambda y: y.__iadd__(1),
    "assignment": lambda y: y.__setitem__(0, 3) or y,
    "through a view": write_through_view,
    "metadata in place": transpose_in_place,
    "rows": lambda y: torch.stack(list(y)[::2]),
    "data": lambda y: y.data * 1,
    "other data": assign_data,
    "parameter": lambda y: torch.nn.Parameter(y).detach() * 1,
    "gradient of others": gradient_of_other,
    "its own gradient": gradient_of_itself,
    "inference mode": torch.inference_mode()(lambda y: y * 2),
    "vmap": torch.vmap(lambda row: row * 2),
    "deepcopy": copy.deepcopy,
    "shallow copy": copy.copy,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "save": saved,
    "dlpack": torch.from_dlpack,
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "as_tensor": lambda y: torch.tensor(y.tolist()),
    "text": lambda y: f"{y} {y[0, 0]:.3f} {y!r}",
    "number": lambda y: (y[0, 0].item(), float(y[1, 1]), bool(y.sum() > 0)),
    "address": lambda y: y.data_ptr() != 0,
    "compiled": torch.compile(lambda y: (y * 2).relu(), backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("use", USES)
def test_uses(call, use):
    result, exact = USES[use](call()), USES[use](expected(arguments()))
    assert torch.equal(result, exact) if isinstance(exact, torch.Tensor) else result == exact


def test_other_operators_return_plain_tensors(call):
    assert type(call() + 1) is type(call().clone()) is type(torch.nn.functional.silu(call())) is torch.Tensor


def test_code_that_circumvents_the_dispatcher_gets_an_error(call):
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        call().untyped_storage().tolist()


@pytest.mark.parametrize("first_use", ["here", "elsewhere"])
def test_a_use_on_another_stream_waits_for_the_call(cuda, stream, first_use):
    """Whether it is the first use or not."""
    elsewhere, given, result = cuda.stream(), arguments(), torch.zeros(5, 40)
    with cuda.use(stream):
        cuda.block(stream)
        call = streams.begin(given)
        output = PendingTensor(call, call.output)
        if first_use == "here":
            cuda.copy(torch.zeros(5, 40), output.collected)
    with cuda.use(elsewhere):
        cuda.copy(result, output.view(-1).collected)
    assert not result.any()
    cuda.unblock(stream)
    cuda.synchronize(elsewhere)
    assert torch.equal(result, expected(given))


def test_output_of_a_checkpointed_function(call):
    """The forward of reentrant checkpointing runs without gradients, and its output gets some."""

    def function(x):
        return x * 2 if torch.is_grad_enabled() else call()

    x = torch.ones(5, 40, requires_grad=True)
    output = checkpoint(function, x, use_reentrant=True)
    assert torch.equal(output.detach() * 1, expected(arguments()))
    (output * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((5, 40), 6.0))


@pytest.mark.parametrize("begun_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes_of_autograd(call, begun_in, used_in):
    with begun_in():
        output = call()
    with used_in():
        assert torch.equal(output + 1, expected(arguments()) + 1)
    assert output.is_inference() == (begun_in is torch.inference_mode) and not output.requires_grad


def test_an_output_that_is_dropped(call, cuda):
    before = cuda.calls("cudaLaunchHostFunc")
    call()
    streams.synchronize()
    assert cuda.calls("cudaLaunchHostFunc") == before + 1


def test_ended_unseen_while_a_function_is_traced(call):
    held = [call()]

    def drop_and_add(x):
        held.clear()
        return x + 1

    graph = make_fx(drop_and_add)(torch.ones(2)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.add.Tensor"]


class OnStreams(TorchDispatchMode):
    """Enqueues kt::moe_fwd on the current stream, as for tokens on a device, and lists the calls."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.kt.moe_fwd.default:
            return func(*args, **(kwargs or {}))
        self._events.append("begin")
        return pending.output(streams.begin(MoeArguments(*args)))


@pytest.mark.parametrize(
    ("architecture", "order"),
    [
        ("deepseek_v3", ["begin", "shared experts", "collect"]),
        ("qwen2_moe", ["shared experts", "begin", "collect"]),
        ("qwen3_moe", ["begin", "collect"]),
    ],
)
def test_shared_experts_run_meanwhile(call, cuda, stream, monkeypatch, enabled, architecture, order):
    """If the model calls them after its routed experts. Results are the same in any case."""
    model = tiny_model(architecture)
    model.set_experts_implementation("ktops")
    batch, events = {"input_ids": tiny_batch()["input_ids"]}, []
    with torch.no_grad():
        exact = model(**batch).logits
    collect = streams.Pending.result
    for name, module in model.named_modules():
        if name.endswith(("shared_experts", "shared_expert")):
            module.register_forward_hook(lambda *_: events.append("shared experts"))
    monkeypatch.setattr(streams.Pending, "result", lambda self: events.append("collect") or collect(self))
    monkeypatch.setattr(ktops.nn.experts, "moe_sft", pending.moe_sft_pending)
    with torch.no_grad(), cuda.use(stream), OnStreams(events):
        output = model(**batch).logits
    assert torch.equal(output, exact)
    layers = sum(event == "begin" for event in events)
    assert layers and events == order * layers


@pytest.mark.parametrize("merged", [False, True])
def test_merging_adapters_waits_for_calls(cuda, stream, enabled, monkeypatch, merged):
    """They still read the weights that it changes in place."""
    model = adapted("qwen3_moe").eval()
    experts = model.get_base_model().model.layers[0].mlp.experts
    ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
    given = torch.randn(3, experts.get_base_layer().down_proj.shape[1]), ids, torch.rand(3, 2)
    if merged:
        model.merge_adapter()
    with torch.no_grad():
        exact = experts(*given)
    synchronize = streams.synchronize
    monkeypatch.setattr(streams, "synchronize", lambda: (cuda.unblock(stream), synchronize()))
    monkeypatch.setattr(ktops.nn.experts, "moe_sft", pending.moe_sft_pending)
    with torch.no_grad(), cuda.use(stream), OnStreams([]):
        cuda.block(stream)
        output = experts(*given).collected
    model.unmerge_adapter() if merged else model.merge_adapter()
    cuda.unblock(stream)
    cuda.synchronize(stream)
    assert torch.equal(output, exact)


def test_the_kernel_for_cuda_enqueues(cuda, stream, monkeypatch):
    """``kt::moe_fwd`` collects at once unless a caller can do with less; in a capture always."""
    monkeypatch.setattr(streams, "available", lambda device_type: True)
    given = arguments(lora_rank=4)
    with cuda.use(stream):
        output = kernels.moe_fwd(*given)
        cuda.synchronize(stream)
    assert type(output) is torch.Tensor and torch.equal(output, expected(given))
    monkeypatch.setattr(pending, "moe_sft", lambda: kernels.moe_fwd(*given))
    with cuda.use(stream):
        assert isinstance(pending.moe_sft_pending(), PendingTensor)
    with cuda.capture(stream) as graph:
        captured = pending.moe_sft_pending()
    graph.launch(stream)
    cuda.synchronize(stream)
    assert type(captured) is torch.Tensor and torch.equal(captured, expected(given))
    graph.destroy()
