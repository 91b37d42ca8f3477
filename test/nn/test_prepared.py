"""In inference, KTExperts passes only the tokens; weights that change in between are noticed."""

import copy
import gc
import os
import pickle
import threading

import accelerate
import pytest
import torch
from small_experts import H, I, K, T, make, tokens
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ktops
from ktops.nn import KTExperts
from ktops.nn.prepared import PREPARED, forward_prepared
from ktops.testing.counts import counted


def general(experts: KTExperts, *inputs) -> torch.Tensor:
    """Runs the operator that takes all arguments: with gradients on, nothing is prepared."""
    with torch.enable_grad():
        assert forward_prepared(experts, *inputs, {}) is None
        return experts(*inputs).detach()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


OPTIONS = [{}, {"gating": "none", "activation": "relu2"}, {"activation": "gelu", "gating": "interleaved"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"bias": True}], ids=str)
@pytest.mark.parametrize("weight_format", [None, "int4"])
def test_same_bits(weight_format, options):
    experts = make(weight_format, compute="bf16", **options)
    for number in (1, T, 0, 40):
        inputs = tokens(number)
        assert torch.equal(experts(*inputs), general(experts, *inputs))
    assert getattr(experts, PREPARED) is not None


def test_only_tokens_are_passed():
    experts, inputs = make("int4"), tokens()
    experts(*inputs)
    with counted() as counts:
        experts(*inputs)
    assert [name for name in counts.operators if name.startswith("kt::")] == ["kt::moe_fwd_prepared"]


@pytest.mark.parametrize("change", ["values", "data", "parameter", "function", "load"])
def test_weights_that_change(change):
    experts, inputs = make(), tokens()
    before = experts(*inputs)
    if change == "values":
        experts.down_proj.mul_(2)
    elif change == "data":
        experts.down_proj.data = experts.down_proj.detach().clone().mul_(2)
        gc.collect()
    elif change == "parameter":
        experts.down_proj = torch.nn.Parameter(experts.down_proj.detach() * 2)
    elif change == "function":
        experts.function = experts.function._replace(activation="relu")
    else:
        state = {name: tensor * 2 for name, tensor in experts.state_dict().items()}
        experts.load_state_dict(state, assign=True)
    after = experts(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, general(experts, *inputs))


def test_codes_that_are_replaced():
    experts, inputs = make("int4"), tokens()
    before = experts(*inputs)
    other = make("int4")
    state = other.state_dict()
    state["down_proj.scale"] = state["down_proj.scale"] * 2
    experts.load_state_dict(state)
    after = experts(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, general(experts, *inputs))


def prune_down(experts: KTExperts) -> None:
    prune.l1_unstructured(experts, "down_proj", 0.5)


def store_as_buffer(experts: KTExperts) -> None:
    weight = experts.down_proj.detach() * 2
    del experts.down_proj
    experts.register_buffer("down_proj", weight)


def store_as_attribute(experts: KTExperts) -> None:
    bias = experts.down_proj_bias.detach() * 2
    del experts.down_proj_bias
    experts.down_proj_bias = bias


@pytest.mark.parametrize("change", [prune_down, store_as_buffer, store_as_attribute])
def test_weights_that_are_no_parameters(change):
    experts, inputs = make(bias=True), tokens()
    before = experts(*inputs)
    change(experts)
    after = experts(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, general(experts, *inputs))


def test_offloaded_weights_are_not_kept():
    experts, inputs = make(), tokens()
    expected = general(experts, *inputs)
    accelerate.cpu_offload(experts, execution_device=torch.device("cpu"))
    assert torch.equal(experts(*inputs), expected)
    assert experts.down_proj.is_meta and getattr(experts, PREPARED, None) is None


def test_routes_that_only_the_general_path_takes():
    experts, (x, ids, weights) = make(), tokens()
    experts(x, ids, weights)
    for inputs in ((x, ids[None], weights[None]), (x, ids, torch.ones_like(ids))):
        assert torch.equal(experts(*inputs), general(experts, *inputs))


def test_another_dtype():
    experts, inputs = make(), tokens()
    experts(*inputs)
    experts.float()
    x, ids, weights = inputs
    assert torch.equal(experts(x.float(), ids, weights), general(experts, x.float(), ids, weights))
    assert experts(x, ids, weights).dtype == torch.bfloat16


def test_errors_are_those_of_the_operator():
    experts, (x, ids, weights) = make(), tokens()
    experts(x, ids, weights)
    with pytest.raises(RuntimeError, match=r"kt::moe_fwd: gate_up_proj must have shape .*hidden_size=63"):
        experts(x[:, 1:], ids, weights)
    with pytest.raises(RuntimeError, match=r"kt::moe_fwd: topk_ids must be int32 or int64"):
        experts(x, ids.double(), weights)
    with pytest.raises(RuntimeError, match="gate_up_proj must be on cpu, got meta"):
        make().to("meta")(x, ids, weights)
    with pytest.raises(RuntimeError, match="experts must come from kt::prepare_moe"):
        torch.ops.kt.moe_fwd_prepared(x, ids, weights, 0)


def test_copies_prepare_their_own():
    experts, inputs = make(), tokens()
    expected = experts(*inputs)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert getattr(other, PREPARED) is None
        assert torch.equal(other(*inputs), expected)
    del other
    gc.collect()
    assert torch.equal(experts(*inputs), expected)


def test_released_with_the_experts():
    experts, inputs = make(), tokens()
    experts(*inputs)
    number = getattr(experts, PREPARED).experts
    assert torch.ops.kt.moe_fwd_prepared(*inputs, number) is not None
    del experts
    gc.collect()
    with pytest.raises(RuntimeError, match="experts must come from"):
        torch.ops.kt.moe_fwd_prepared(*inputs, number)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_released_unseen_while_a_function_is_traced(pre_dispatch):
    """A graph with the release would release, each time that it runs, whatever then has the number."""
    inputs = tokens()
    held = [make()]
    held[0](*inputs)
    number = getattr(held[0], PREPARED).experts

    def free_and_add(x):
        held.clear()
        gc.collect()
        return x + 1

    graph = make_fx(free_and_add, pre_dispatch=pre_dispatch)(inputs[0]).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.add.Tensor"]
    with pytest.raises(RuntimeError, match="experts must come from"):
        torch.ops.kt.moe_fwd_prepared(*inputs, number)


@pytest.mark.parametrize("mode", ["dispatch", "function", "fake"])
def test_released_unseen_under_modes(mode):
    experts, inputs = make(), tokens()
    experts(*inputs)
    number = getattr(experts, PREPARED).experts
    seen = {"dispatch": Seen, "function": SeenFunctions, "fake": FakeTensorMode}[mode]()
    with seen:
        del experts
        gc.collect()
    assert mode == "fake" or seen.ops == []
    with pytest.raises(RuntimeError, match="experts must come from"):
        torch.ops.kt.moe_fwd_prepared(*inputs, number)


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operator():
    experts, inputs = make(), tokens()
    experts(*inputs)
    with Seen() as seen:
        experts(*inputs)
    assert "kt::moe_fwd" in seen.ops
    with FlopCounterMode(display=False) as counter:
        experts(*inputs)
    assert counter.get_total_flops() == 6 * T * K * H * I


def test_profile_has_the_same_name():
    experts, inputs = make("int4"), tokens()
    experts(*inputs)
    with ktops.profile() as profile:
        experts(*inputs)
    assert {step.op for step in profile.steps} == {"moe_fwd"}
    assert {"arguments", "gate_up", "down"} <= {step.name for step in profile.steps}


def test_threads_and_a_forked_child():
    experts, inputs = make(), tokens()
    expected = experts(*inputs)
    results: list[torch.Tensor] = []

    def work():
        with torch.no_grad():
            results.extend(experts(*inputs) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 150 and all(torch.equal(result, expected) for result in results)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(experts(*inputs), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
