"""torch.compile, opcheck and fake tensors with tokens and routes on a device."""

import pytest
import torch
from functorch.compile import make_boxed_func
from simulated.conftest import TOKENS, fake, inputs, on_device
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

import ktops
from ktops.ops.arguments import GRADIENTS
from ktops.ops.check_devices import LORA
from ktops.testing.inputs import op_arguments, require_grad

TRAINED = ("hidden_states", "topk_weights", *LORA)
EVERY_GRADIENT = (1 << len(GRADIENTS)) - 1


@pytest.fixture(autouse=True)
def fresh_cache():
    torch.compiler.reset()


def layer(hidden_states, **options):
    return 2 * ktops.moe_sft(hidden_states.sin(), **options)


@pytest.mark.parametrize("op", ["moe_fwd", "moe_sft_fwd", "moe_sft_bwd", "moe_fwd_streamed"])
def test_compiled_cuda_graphs_do_not_contain_the_operators(op):
    """With ``mode="reduce-overhead"``, Inductor splits a graph around operators with this tag."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.kt, op).default.tags


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_equals_eager(device, training, dynamic):
    backend = "eager" if training else "aot_eager"  # whose backward does not know the simulated tensors
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    results = []
    for function in (layer, compiled):
        given = on_device(inputs())
        given = require_grad(given, *TRAINED) if training else given
        output = function(**given)
        if training:
            output.sum().backward()
        results.append([output, *(given[name].grad for name in TRAINED if training)])
    for expected, actual in zip(*results, strict=True):
        assert actual.device == expected.device and torch.equal(actual.cpu(), expected.cpu())


@pytest.mark.parametrize("op", ["moe_fwd", "moe_sft_fwd", "moe_sft_bwd"])
def test_opcheck(device, op):
    """Without the check of autograd's registration, which knows no other devices than torch's own."""
    given = on_device(inputs(), "down_lora_A")
    arguments: tuple = op_arguments(given)
    if op != "moe_fwd":
        arguments = (*arguments, "activations")
    if op == "moe_sft_bwd":
        output, *saved, x, ids, weights = torch.ops.kt.moe_sft_fwd(*arguments)
        arguments = (torch.ones_like(output), x, ids, weights, *arguments[3:], *saved, EVERY_GRADIENT)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.kt, op).default, arguments, test_utils=tests)


def all_fake(given: dict) -> dict:
    return {name: fake(value) for name, value in given.items()}


def description(results) -> list:
    return [None if x is None else (x.device, x.shape, x.dtype, x.stride()) for x in results]


@pytest.mark.parametrize("moved", [(), LORA], ids=["host", "device"])
def test_fake_kernels_describe_the_real_ones(device, moved):
    given = on_device(inputs(dtype=torch.bfloat16), *moved)

    def results(given: dict) -> list:
        arguments = op_arguments(given)
        output, *saved, x, ids, weights = forward = torch.ops.kt.moe_sft_fwd(*arguments, "recompute")
        host = arguments._replace(hidden_states=x, topk_ids=ids, topk_weights=weights)
        backward = torch.ops.kt.moe_sft_bwd(output, *host, "recompute", *saved, EVERY_GRADIENT)
        return description([torch.ops.kt.moe_fwd(*arguments), *forward, *backward])

    with FakeTensorMode():
        fake_results = results(all_fake(given))
    assert fake_results == results(given)


def test_fake_kernels_refuse_what_the_real_ones_refuse(device):
    given = on_device(inputs(), "down_proj")
    with FakeTensorMode(), pytest.raises(RuntimeError, match="down_proj must be on cpu"):
        ktops.moe_sft(**all_fake(given))


def test_the_graph_has_one_operator_each_way(device):
    """What compilers for a real device see: the operators with tensors on it, and no copies."""
    graphs = []

    def record(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    # A FakeTensorMode is not made for the engine's second thread, that of the device.
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        given = require_grad(all_fake(on_device(inputs())), *TRAINED)
        torch.compile(layer, fullgraph=True, backend=backend)(**given).sum().backward()
        assert all(given[name].grad.device == given[name].device for name in TRAINED)
    names = [[str(node.target) for node in graph if "getitem" not in node.name] for graph in graphs]
    assert [[name for name in graph if not name.startswith("aten.")] for graph in names] == [
        ["kt.moe_sft_fwd.default"],
        ["kt.moe_sft_bwd.default"],
    ]
    assert not any("copy" in name for graph in names for name in graph)
    (backward,) = (node for node in graphs[1] if str(node.target) == "kt.moe_sft_bwd.default")
    saved = [argument.meta["val"].device.type for argument in backward.args[1 : 1 + len(TOKENS)]]
    assert saved == ["cpu"] * len(TOKENS)
